#!/usr/bin/env bash
# curl: health, models, an answer, a stream that ends with [DONE], refusals, metrics.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: $0 BASE_URL MODEL" >&2; exit 2; }
base="${1%/}" model="$2"
key=(--header "Authorization: Bearer ${OPENAI_API_KEY:-none}")

expect() { # what got wanted
    [ "$2" = "$3" ] || { echo "error: $1 is '$2', not '$3'" >&2; exit 1; }
}
status() { # of a request
    curl --silent --output /dev/null --write-out '%{http_code}' "${key[@]}" "$@"
}
body() { # of a completion, with the last part of the JSON object
    printf '{"model": "%s", "prompt": "import os", "temperature": 0, %s}' "$model" "$1"
}

expect "health" "$(curl --silent --output /dev/null --write-out '%{http_code}' "$base/health")" 200
expect "models" "$(status "$base/v1/models")" 200
curl --silent --fail "${key[@]}" "$base/v1/completions" -d "$(body '"max_tokens": 8, "ignore_eos": true')" |
    grep --quiet '"completion_tokens": *8'
stream=$(curl --silent --fail --no-buffer "${key[@]}" "$base/v1/completions" -d "$(body '"max_tokens": 8, "stream": true')")
expect "the end of a stream" "$(echo "$stream" | grep '^data:' | tail -n 1)" "data: [DONE]"
expect "a wrong parameter" "$(status "$base/v1/completions" -d "$(body '"max_tokens": -1')")" 400
expect "a wrong path" "$(status "$base/v1/nothing")" 404
expect "a wrong method" "$(status --request DELETE "$base/v1/completions")" 405
curl --silent --fail "${key[@]}" "$base/metrics" | grep --quiet '^moeyard_expert_tokens_total{'
