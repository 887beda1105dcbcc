"""Does any route let a caller without the key in, and does the key get into a log?

    python scripts/chaos/auth.py [BASE_URL --api-key KEY]

Every path and method with keys that are missing, wrong, near, in other cases, doubled and in other
headers. What is not open must answer 401 (or be refused as HTTP before that, below 500); Ray's own
paths are listed. Afterwards neither the right key nor a part of it may stand in any file that the
server has written; that part needs the server that is started here.
"""

import time

import httpx

from served import KEY, NEW_CONNECTIONS, Target, arguments, end, target_of

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
OPEN = {"/health"}
RAYS_OWN = {"/-/healthz", "/-/routes"}
"""Answered by Ray's proxy, before anything of ours."""
PATHS = [
    *sorted(OPEN | RAYS_OWN),
    *["/metrics", "/v1/models", "/v1/models/small", "/v1/completions", "/v1/chat/completions"],
    *["/", "/v1", "/v1/", "/docs", "/openapi.json", "/redoc", "/favicon.ico", "/admin", "/v2"],
    *["/health/", "/health/../metrics", "/healthx", "/HEALTH", "//metrics", "/metrics/", "/-/x"],
    *["/health%2f..%2fmetrics", "/health;/metrics", "/health?a=/metrics", "/%68ealth/metrics"],
]
STRANGER = httpx.Client(timeout=60, limits=NEW_CONNECTIONS)
CHOSEN = {"GET", "POST"}
"""Methods that an open path may answer."""


def wrong_keys(key: str) -> dict[str, list[tuple[str, str]]]:
    """Return headers that must let no one in, by name."""
    right = f"Bearer {key}"
    return {
        "none": [],
        "empty": [("Authorization", "")],
        "no scheme": [("Authorization", key)],
        "Basic": [("Authorization", f"Basic {key}")],
        "shorter": [("Authorization", right[:-1])],
        "longer": [("Authorization", right + "0")],
        "other case": [("Authorization", f"Bearer {key.upper()}")],
        "two blanks": [("Authorization", f"Bearer  {key}")],
        "first letter": [("Authorization", f"Bearer x{key[1:]}")],
        "Latin": [("Authorization", "Bearer \xe9\xff")],
        "other header": [("X-Api-Key", key), ("Api-Key", key), ("Cookie", right)],
        "wrong, then right, in one": [("Authorization", f"Bearer wrong, {right}")],
        "right, then wrong": [("Authorization", right), ("Authorization", "Bearer wrong")],
    }


def main() -> None:
    given = arguments(__doc__).parse_args()
    if given.base is not None and given.api_key is None:
        raise SystemExit("give the server's --api-key, to try keys near it")
    with target_of(given) as target:
        assert target.key is not None, "the server has a key"
        for path in PATHS:
            for method in METHODS:
                for name, headers in wrong_keys(target.key).items():
                    check(target, method, path, name, headers)
        target.show_counts("requests")
        target.check_alive()
        time.sleep(2)  # logs are written behind
        check_logs(target)
    end(target)


def check(target: Target, method: str, path: str, name: str, headers: list) -> None:
    """Send one request with a wrong key."""
    raw = [(key, value.encode("latin1")) for key, value in headers]
    answer = STRANGER.request(method, target.base + path, headers=raw)
    what = f"{method} {path} with key {name!r}"
    status = answer.status_code
    target.counts[status] += 1
    if status >= 500:
        target.fault(f"{what}: {status} {answer.text[:200]}")
    plain = path.partition("?")[0]
    if status < 400 and plain not in OPEN | RAYS_OWN:
        target.fault(f"{what}: {status}")
    if status not in (400, 401, 404, 405) and plain not in OPEN | RAYS_OWN:
        target.fault(f"{what}: {status}, not 401")
    if status == 200 and plain in OPEN and method not in CHOSEN | {"HEAD"}:
        target.fault(f"{what}: {status} on an open path")
    if status == 401 and target.key is not None and target.key in answer.text:
        target.fault(f"{what}: the answer holds the key")


def check_logs(target: Target) -> None:
    """Search all that the server has written for the key."""
    files = [p for log in target.logs for p in ([log] if log.is_file() else log.rglob("*"))]
    files = [path for path in files if path.is_file()]
    print(f"log files {len(files)}, bytes {sum(path.stat().st_size for path in files)}")
    for path in files:
        if KEY.encode() in path.read_bytes():
            target.fault(f"{path.name} holds the key")


if __name__ == "__main__":
    main()
