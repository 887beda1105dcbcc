"""A locustfile: users that send requests at fixed times to a server, for benchmarks/serving.py.

    pip install --target FOLDER locust
    python benchmarks/serving.py MODEL_DIR overload --locust FOLDER

Each user sends a request every USER_PERIOD_S, or later where the last one has not ended by then. So
there must be many of them: the rate is their number divided by the period.
"""

import os

from locust import FastHttpUser, constant_pacing, task

USER_PERIOD_S = 8.0


class User(FastHttpUser):
    wait_time = constant_pacing(USER_PERIOD_S)
    connection_timeout = network_timeout = 120.0

    @task
    def complete(self) -> None:
        body = {"model": os.environ["MODEL"], "prompt": "hello 1", "max_tokens": 32}
        body |= {"ignore_eos": True, "temperature": 0}
        url = "/v1/completions"
        with self.client.post(url, json=body, catch_response=True, name="?") as answer:
            status = answer.status_code
            answer.request_meta["name"] = str(status)
            is_whole = status == 200 and answer.json()["usage"]["completion_tokens"] == 32
            if is_whole or (status == 429 and "Retry-After" in answer.headers):
                answer.success()
            else:
                answer.failure(f"{status}: {answer.text}")
