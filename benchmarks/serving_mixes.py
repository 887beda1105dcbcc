"""Random mixes of requests, and their answers down to the last bit of reported scores."""

from dataclasses import replace

from moeyard.moe.models.sampling import SamplingParams
from moeyard.serving.engine.sequence import GenerationRequest

GREEDY = SamplingParams(temperature=0)
HOT = SamplingParams(temperature=1.3, top_p=0.95, top_k=60)


def random_requests(chance, count, longest=70, most_tokens=20, texts=2, adapters=(None,)):
    """Requests whose prompts often begin alike; some in groups, sampled, scored or with salts."""
    beginnings = [[chance.randrange(256) for _ in range(longest)] for _ in range(texts)]
    found = []
    for index in range(count):
        prompt = chance.choice(beginnings)[: chance.choice([3, chance.randint(1, longest)])]
        if chance.random() < 0.5:
            prompt = [*prompt[:-1], *(chance.randrange(256) for _ in range(chance.randint(1, 8)))]
        one = GenerationRequest(
            request_id=f"{index}",
            prompt_ids=tuple(prompt),
            max_tokens=chance.choice([most_tokens, chance.randint(1, most_tokens)]),
            sampling=chance.choice([GREEDY, HOT]),
            num_logprobs=2,
            scores_prompt=chance.random() < 0.15,
            priority=chance.choice([0, 0, 1, -1]),
            cache_salt=chance.choice(["", "", "s"]),
            adapter=chance.choice(adapters),
        )
        copies = chance.choice([1, 1, 3])
        for copy in range(copies):
            name, group = f"{index}.{copy}", f"{index}" if copies > 1 else ""
            found.append(replace(one, request_id=name, seed=7 * index + copy, group=group))
    return found


class Answers:
    """Plays the client of an engine and keeps what each request was told."""

    def __init__(self, engine):
        self.engine = engine
        self.texts, self.scores, self.reasons, self.cached = {}, {}, {}, {}

    def add(self, *requests):
        for one in requests:
            self.engine.add(one)

    def step(self):
        for event in self.engine.step():
            name = event.request_id
            assert event.error is None, event.error
            self.texts[name] = self.texts.get(name, "") + event.text
            self.scores.setdefault(name, []).extend(
                (score.token, score.logprob, score.top) for score in event.logprobs
            )
            self.cached[name] = event.cached_tokens
            if event.finish_reason is not None:
                self.reasons[name] = event.finish_reason

    def finish(self, most_steps=5000):
        for _ in range(most_steps):
            if not self.engine.has_work:
                return self
            self.step()
        raise AssertionError("requests never end")

    def of(self, name):
        """Return all that a client learns, but for the tokens it did not pay for."""
        return self.texts[name], self.reasons[name], self.scores[name]


def alone(make_engine, one):
    """Return what a request is told when it is the only one that an engine has ever had."""
    found = Answers(make_engine())
    found.add(one)
    return found.finish().of(one.request_id)


def mixed(engine, requests, chance):
    """Run requests that come at random moments, and return their answers."""
    found, waiting = Answers(engine), list(requests)
    while waiting:
        for _ in range(chance.choice([1, 1, 2, 5])):
            if waiting:
                found.add(waiting.pop(0))
        for _ in range(chance.choice([0, 1, 4])):
            found.step()
    return found.finish()


def gauges(engine):
    """Return what must be 0 when no request is left."""
    metrics = {
        (sample.name, *sample.labels.values()): sample.value
        for family in engine.metrics.registry.collect()
        for sample in family.samples
    }
    names = [("moeyard_requests_running",), ("moeyard_requests_waiting",)]
    return {name: metrics[name] for name in [*names, ("moeyard_kv_blocks", "used")]}


def counted(engine, name):
    """Return a counter."""
    return engine.metrics.registry.get_sample_value(f"moeyard_{name}_total")
