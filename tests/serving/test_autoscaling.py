"""A burst brings a second replica, and its end takes it away, without a lost answer."""

import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from server_process import BIN, Running, free_port
from small_model import CONFIG, write_random_model

WAIT_S = 180.0


@pytest.mark.slow
def test_a_burst_adds_a_replica_and_its_end_removes_one(tmp_path):
    folder = tmp_path / "long"
    write_random_model(folder, CONFIG.model_copy(update={"max_positions": 8192}))
    port = free_port()
    command = [str(BIN / "moeyard"), "serve", str(folder), "--port", str(port), "--num-threads"]
    command += ["1", "--max-num-seqs", "2", "--max-replicas", "2", "--downscale-delay", "5"]
    running = Running(command, tmp_path / "log.txt", port)
    client = openai.OpenAI(base_url=f"{running.base}/v1", api_key="none", max_retries=5)

    def ask(number):
        while time.monotonic() < ends:
            answer = client.completions.create(
                model="long", prompt=f"hello {number}", max_tokens=60, temperature=0
            )
            assert answer.choices[0].finish_reason

    def wait_for(count):
        deadline = time.monotonic() + WAIT_S
        while len(running.replicas()) != count:
            assert time.monotonic() < deadline, f"there are {len(running.replicas())} replicas"
            time.sleep(0.2)

    try:
        running.wait_until_ready()
        time.sleep(10)
        assert len(running.replicas()) == 1, "nothing has been asked yet"
        ends = time.monotonic() + WAIT_S
        with ThreadPoolExecutor(6) as pool:
            tasks = [pool.submit(ask, number) for number in range(6)]
            started = time.monotonic()
            wait_for(2)
            print(
                f"\na second replica was started {time.monotonic() - started:.1f} s after a burst"
            )
            ends = 0.0
            for task in tasks:
                task.result()
        wait_for(1)
        assert client.completions.create(model="long", prompt="a", max_tokens=2).choices
        assert running.stop() == 0, running.log()
    finally:
        running.end()
