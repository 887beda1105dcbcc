"""A process that has some of the experts and computes them for a leader.

n rows, K choices, r routed rows whose expert is here, D model width.
"""

import json
import logging
import os
import time

import numpy as np
import torch
from torch import Tensor

from ...errors import ExpertReadError
from ...kernels.values.memory import is_out_of_memory
from ...kernels.waves import start_waves
from ...moe.folders.folder import ModelFolder
from ...moe.folders.hub import local_folder
from ...moe.routers.own_code import allow
from ...moe.routes.rows import Phase
from ..experts.forwards import Forward
from ..experts.opening import open_store
from ..memory import available_bytes
from .channel import Channel, LostPeerError
from .connecting import Listener
from .facts import Facts
from .frames import Head, Kind, offsets
from .owner_spec import OwnerSpec
from .run_experts import read_first, run_experts

log = logging.getLogger(__name__)


class Owner:
    """Experts behind a store, and the answers to a leader's frames.

    It keeps nothing between two requests but its store. So a leader may ask again, or come back.
    """

    def __init__(self, spec: OwnerSpec) -> None:
        """Open the folder, and read what is to be in memory from the start."""
        allow(spec.allow_code)
        torch.set_num_threads(spec.num_threads)
        files = ModelFolder(local_folder(spec.model))
        assert files.config.moe is not None, "the leader has counted the experts"
        self._dtype, self._d_model = spec.torch_dtype, files.config.d_model
        self._num_experts = files.config.moe.num_experts
        self._store = open_store(
            files,
            self._dtype,
            spec.budget_bytes,
            options=spec.store_options,
            free_bytes=available_bytes(),
        )
        with torch.inference_mode():
            read_first(self._store, dict(spec.reads_first))
        self._facts = Facts.of(files, self._dtype, os.getpid(), self._store.num_slots)

    def serve(self, listener: Listener) -> None:
        """Answer one leader after the other, until the listener is closed."""
        while True:
            facts = np.frombuffer(bytearray(self._facts.to_json()), dtype=np.uint8)
            channel = listener.accept(torch.from_numpy(facts))
            try:
                with torch.inference_mode():
                    self._answer_all(channel)
            except LostPeerError as error:
                log.info("the leader has gone: %s", error)
            finally:
                channel.close()

    def close(self) -> None:
        """Stop the reading threads."""
        self._store.close()

    def _answer_all(self, channel: Channel) -> None:
        while True:
            head, payload = channel.receive()
            if head.kind == Kind.COMPUTE:
                self._answer(channel, head, payload)
            elif head.kind == Kind.BEGIN:
                sequences, phases, lengths = payload.view(torch.int64)[: 3 * head.rows].view(3, -1)
                self._store.begin(
                    Forward(
                        tuple(sequences.tolist()),
                        tuple(map(Phase, phases.tolist())),
                        tuple(lengths.tolist()),
                    )
                )
            elif head.kind == Kind.PREFETCH:
                experts = payload.view(torch.int64)[: head.rows].tolist()
                self._store.prefetch(head.layer, experts)
            else:
                raise LostPeerError("it sent a frame of an unknown kind")

    def _answer(self, channel: Channel, head: Head, payload: Tensor) -> None:
        started = time.perf_counter()
        reply = Head(Kind.LINES, head.number, head.layer, head.rows, head.choices)
        try:
            lines_rD = self._lines(head, payload)
        except ExpertReadError as error:
            channel.send(reply._replace(kind=Kind.FAILED), [_problem(str(error), error.experts)])
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            text = "an owner of experts has no memory left for these rows; try again later."
            channel.send(reply._replace(kind=Kind.FAILED), [_problem(text, ())])
            return
        traffic = self._store.statistics.layers[head.layer]
        counted = reply._replace(
            hits=traffic.hits,
            misses=traffic.misses + traffic.prefetch_late,
            bytes_read=traffic.bytes_read,
            stall_s=traffic.stall_s,
            seconds=time.perf_counter() - started,
        )
        channel.send(counted, [lines_rD])

    def _lines(self, head: Head, payload: Tensor) -> Tensor:
        """Return a line for each routed row, in the order of the rows and their choices."""
        row_bytes = head.rows * self._d_model * self._dtype.itemsize
        (_, ids_at), _ = offsets([row_bytes, head.rows * head.choices * 4])
        x_nD = payload[:row_bytes].view(self._dtype).view(head.rows, self._d_model)
        ids = payload[ids_at : ids_at + head.rows * head.choices * 4]
        experts_nK = ids.view(torch.int32).view(head.rows, head.choices)
        # The leader applies the weights, when it adds lines.
        waves = start_waves(x_nD, experts_nK, x_nD.new_zeros(experts_nK.shape), self._num_experts)
        run_experts(self._store, head.layer, self._num_experts, waves, experts_nK)
        return waves.lines((experts_nK.reshape(-1) >= 0).nonzero().flatten())


def _problem(message: str, experts: tuple[int, ...]) -> Tensor:
    text = json.dumps({"message": message, "experts": experts}).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
