"""The predictors by name: a new one is a file next to this one and a line here."""

from collections.abc import Callable
from pathlib import Path

from ....errors import ConfigError
from ....moe.config.model import LayersConfig
from ....moe.models.model import Model
from ....moe.routers.router import RouterSizes
from ....moe.routers.routing import Lookahead
from ....moe.routes.identity import identity_of
from ....moe.routes.reader import RouteFile
from ....moe.without_memory import without_memory
from ..policies.policy import CacheFacts
from . import fitted_gates
from .activations import Activations
from .next_gates import NextGates, has_scores
from .predictor import Predictor, PredictorFacts
from .previous_layers import PreviousLayers
from .previous_token import PreviousToken
from .replay import learn
from .trained import Trained, read

LEARNING: dict[str, Callable[[PredictorFacts], Predictor]] = {
    "previous_layers": PreviousLayers,
    "activations": Activations,
}
"""Learn while they run; ``NAME:FILE`` lets them learn a route file first."""
REPLAYABLE = ("previous_token", *LEARNING, "trained")
"""Those that routes alone suffice for."""
PREDICTORS = ("auto", "none", "next_gates", fitted_gates.NAME, *REPLAYABLE)
WITH_FILE = {
    fitted_gates.NAME: "moeyard trace gates -o FILE",
    "trained": "moeyard trace predict --save FILE",
}
"""Predictors that need a file, and what writes it."""


def split_spec(spec: str) -> tuple[str, Path | None]:
    """Return name and file of ``NAME`` or ``NAME:FILE``; raises :class:`ConfigError`."""
    name, _, file = spec.partition(":")
    if name not in PREDICTORS:
        raise ConfigError(
            f"expert_predictor is {spec!r}; use one of {', '.join(_spellings())}, or an object "
            "with the methods of moeyard.serving.experts.predictors.predictor.Predictor."
        )
    if name in WITH_FILE and not file:
        raise ConfigError(
            f"expert_predictor is {name!r}, which needs a file: {name}:FILE, written by "
            f"{WITH_FILE[name]}."
        )
    if file and name not in (*LEARNING, *WITH_FILE):
        raise ConfigError(f"expert_predictor is {spec!r}, but {name} takes no file; leave it out.")
    return name, Path(file) if file else None


def _spellings() -> list[str]:
    return [f"{name}:FILE" if name in WITH_FILE else name for name in PREDICTORS]


def check_predictor(predictor: str | Predictor) -> None:
    """Raise :class:`ConfigError` for a name that is none."""
    if isinstance(predictor, str):
        split_spec(predictor)


def check_fit(spec: str, config: LayersConfig) -> str:
    """Return the name of the predictor that a model gets; ``auto`` becomes one of the others.

    ``auto`` is ``next_gates`` where routers have scores. Raises :class:`ConfigError` for a
    predictor that does not fit the model. Reads no file.
    """
    name, _ = split_spec(spec)
    problem = why_not(config)
    assert config.moe is not None, "a store has experts"
    sizes = RouterSizes(config.d_model, config.moe.num_experts, config.vocab_size)
    with without_memory():
        can_ask_gates = problem is None and has_scores(config.moe.router.build(sizes))
    if name == "auto":
        return "next_gates" if can_ask_gates else "none"
    if name != "none" and problem is not None:
        raise ConfigError(f"expert_predictor is {spec!r}, but {problem}; use auto or none.")
    if name in REPLAYABLE and _num_known(config):
        raise ConfigError(
            f"expert_predictor is {spec!r}, but router.lookahead is previous_block, so the next "
            "layer's experts are known and only those of later layers can be foretold; use "
            f"next_gates, {fitted_gates.NAME}:FILE, auto or none."
        )
    if name in ("next_gates", fitted_gates.NAME) and not can_ask_gates:
        raise ConfigError(
            f"expert_predictor is {spec!r}, but router.kind is {config.moe.router.kind}, which "
            f"has no scores from one product; use one of {', '.join(REPLAYABLE)}."
        )
    return name


def why_not(config: LayersConfig) -> str | None:
    """Return in one sentence why a model's experts cannot be predicted, or None."""
    assert config.moe is not None, "a store has experts"
    router = config.moe.router
    if not config.generates:
        return (
            f"the model is of kind {config.kind}, and predictors are for models that continue texts"
        )
    if router.reads_at() is Lookahead.TOKEN:
        return "the router chooses by tokens, so the store knows what to read without a predictor"
    if router.varies:
        return f"router.kind is {router.kind}, where a token visits any number of experts"
    return None


def facts_of(config: LayersConfig) -> PredictorFacts:
    """Return what predictors of a model are built from."""
    assert config.moe is not None, "a store has experts"
    architecture = identity_of(config).architecture
    sizes = config.moe.num_experts, config.moe.router.k
    return PredictorFacts(tuple(config.moe_layers), *sizes, architecture, _num_known(config))


def _num_known(config: LayersConfig) -> int:
    """Return how many layers have chosen already when the one before them runs."""
    assert config.moe is not None, "a store has experts"
    return int(config.moe.router.reads_at() is Lookahead.PREVIOUS_BLOCK)


def open_predictor(predictor: str | Predictor, decoder: Model) -> Predictor | None:
    """Return a model's predictor, None if there is none to use; raises :class:`ConfigError`.

    ``decoder`` has its weights.
    """
    if not isinstance(predictor, str):
        return predictor
    name, facts = check_fit(predictor, decoder.config), facts_of(decoder.config)
    if name == "none":
        return None
    if name == "next_gates":
        return NextGates(facts, decoder)
    if name == fitted_gates.NAME:
        path = split_spec(predictor)[1]
        assert path is not None, "split_spec asked for it"
        return fitted_gates.open_fitted_gates(path, facts, decoder)
    return open_replayable(name, split_spec(predictor)[1], facts)


def predictor_of_routes(spec: str, facts: CacheFacts, k: int) -> Predictor:
    """Return a predictor to replay on recorded routes; raises :class:`ConfigError`.

    ``k`` are the experts that a row visits, as in the header of a route file.
    """
    name, file = split_spec(spec)
    if name not in REPLAYABLE:
        raise ConfigError(
            f"the predictor is {spec!r}, but routes alone do not say what it would predict; use "
            f"one of {', '.join(REPLAYABLE)}."
        )
    own = PredictorFacts(facts.moe_layers, facts.num_experts, k, facts.architecture)
    return open_replayable(name, file, own)


def open_replayable(name: str, file: Path | None, facts: PredictorFacts) -> Predictor:
    """Return a predictor that routes suffice for; raises :class:`ConfigError`."""
    if name == "trained":
        assert file is not None, "split_spec asked for it"
        return Trained(facts, read(file, facts))
    if name == "previous_token":
        return PreviousToken(facts)
    made = LEARNING[name](facts)
    if file is not None:
        _learn_file(made, name, file, facts)
    return made


def _learn_file(predictor: Predictor, name: str, file: Path, facts: PredictorFacts) -> None:
    found = RouteFile(file)
    if found.header.model.architecture != facts.architecture:
        raise ConfigError(
            f"expert_predictor {name}:{file} belongs to another model: architecture is "
            f"{found.header.model.architecture}, this one has {facts.architecture}; record routes "
            "of this model."
        )
    learn(predictor, found.read(), facts)
