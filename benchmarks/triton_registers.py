"""Compile every shipped configuration of the Triton kernels for sm_80 and sm_90; needs no GPU.

    python benchmarks/triton_registers.py      # writes results/triton_registers.txt

Registers and spilled bytes are cuobjdump's, from the machine code; shared memory is Triton's.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moeyard.kernels.cpu.router import SCORES
from moeyard.kernels.gpu import bias_grad, group_few, grouping, router
from moeyard.kernels.gpu.combine import combine_kernel
from moeyard.kernels.gpu.dequantize import INPUTS, LINES, dequantize_kernel
from moeyard.kernels.gpu.grad_hidden import grad_hidden_kernel
from moeyard.kernels.gpu.grouped_matmul import grouped_matmul_kernel
from moeyard.kernels.gpu.ops import PRECISION
from moeyard.kernels.gpu.quantized_matmul import quantized_matmul_kernel
from moeyard.kernels.gpu.quantized_up import quantized_up_kernel
from moeyard.kernels.gpu.router_grad import route_grad_kernel
from moeyard.kernels.gpu.tiles import GROUP_TILES, Kernel, Tiles, quantized_tiles, tiles_for
from moeyard.kernels.gpu.up_projection import up_projection_kernel
from moeyard.kernels.gpu.weight_grad import weight_grad_kernel
from moeyard.kernels.values.activation import ACTIVATIONS

SHARED_LIMIT = {80: 101_376, 90: 232_448}
"""The most bytes of shared memory of one program. For sm_80 it is that of GeForce cards of the 30
and 40 series, which have less than A100's 166,912; for sm_90, that of H100 and H200."""

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INDEX_POINTERS = {
    *("order_R", "inverse_R", "offsets_S1", "tiles_L2", "slot_of_E", "slot_R", "rank_R"),
    *("before_BS1", "count_S1", "chosen_TK", "part_counts_BE"),
}
FP32_POINTERS = {"part_BR", "weights_R"}
BF16_POINTERS = {"scales_SHG", "scales_SQG"}
SCALAR_POINTERS = {"z_sum", "grad_z"}
FLOATS = {"scale"}
DIVISIBLE = {
    *("d_model", "d_expert", "num_inner", "num_outputs", "num_lines", "num_columns"),
    *("stride_x", "stride_slot", "stride_row", "stride_left", "stride_right", "tile_rows"),
    *("stride_inner", "stride_output", "group_size"),
}
"""Integers that are multiples of 16 for the widths of real models. We tell Triton; at run time it
finds out by itself."""


BIASES = {up_projection_kernel: "bias_SH", grouped_matmul_kernel: "bias_SQ"}
"""Names of bias arguments, which cases leave out without ``has_bias``."""


SPILLS = {grad_hidden_kernel: 384, weight_grad_kernel: 16}
"""Bytes that tiles of 256 columns may spill, behind their loop: they are faster than tiles that
spill nothing (results/tiles_cuda.txt)."""


class Case(NamedTuple):
    """One kernel in one configuration for one architecture."""

    kernel: Any
    arch: int
    dtype: torch.dtype
    constants: dict[str, Any]
    """Values known when compiling: switches, and strides that are 1."""
    pointers: dict[str, str] = {}
    """Types of pointers that are not what their names say elsewhere."""
    tiles: Tiles | None = None
    label: str = ""
    divisible: frozenset[str] = frozenset(DIVISIBLE)
    """Integers that are multiples of 16."""
    num_warps: int = 4
    """Of kernels without tiles."""

    @property
    def name(self) -> str:
        """A line's head in the table."""
        kernel = self.kernel.fn.__name__.removesuffix("_kernel")
        shape = "x".join(map(str, self.tiles[:3])) if self.tiles else "-"
        return f"sm_{self.arch} {kernel:14} {TYPES[self.dtype]} {shape:11} {self.label}".rstrip()


class Compiled(NamedTuple):
    """A case's compiled kernel."""

    case: Case
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_wgmma: int
    num_mma: int

    @property
    def line(self) -> str:
        """A line of the table."""
        unit = f"WGMMA {self.num_wgmma}" if self.num_wgmma else f"MMA {self.num_mma}"
        return (
            f"{self.case.name:70} registers {self.registers:3}  spilled {self.spilled_bytes:4} B"
            f"  shared {self.shared_bytes:6} B  {unit}"
        )

    @property
    def problems(self) -> list[str]:
        """Reasons not to ship this configuration."""
        found = []
        tiles = self.case.tiles
        is_wide = tiles is not None and tiles.N == 256
        if self.spilled_bytes > (SPILLS.get(self.case.kernel, 0) if is_wide else 0):
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.shared_bytes > SHARED_LIMIT[self.case.arch]:
            found.append(f"needs {self.shared_bytes} bytes of shared memory")
        if tiles and self.case.arch == 90 and tiles.M >= 64 and not self.num_wgmma:
            found.append("does not use WGMMA")
        if tiles and not self.num_wgmma + self.num_mma:
            found.append("does not use tensor cores")
        return found


def cases(arch: int) -> Iterator[Case]:
    """Yield every configuration that the launchers can ask for."""
    is_hopper = arch == 90

    def product(
        kernel: Any, kind: Kernel, rows: int, dtype: torch.dtype, label: str, **more: Any
    ) -> Case:
        tiles = tiles_for(kind, rows, dtype, is_hopper)
        pointers = more.pop("pointers", {})
        bias = BIASES.get(kernel)
        if bias is not None and not more.pop("has_bias", False):
            more[bias] = None
        constants = {"PRECISION": PRECISION[dtype], "M": tiles.M, "N": tiles.N, "P": tiles.P}
        constants |= {"GROUP_TILES": GROUP_TILES}
        return Case(kernel, arch, dtype, constants | more, pointers, tiles, label)

    for dtype, rows in itertools.product(TYPES, (16, 32, 64, 128)):
        for even, has_bias in itertools.product((True, False), (False, True)):
            end = f"{'' if even else ', ragged'}{', biased' if has_bias else ''}"
            common = {"IS_EVEN": even, "has_bias": has_bias}
            for act, keep in itertools.product(ACTIVATIONS, (True, False)):
                label = f"{act}, {'keeps h' if keep else 'inference'}{end}"
                constants = common | {"ACTIVATION": act} | ({} if keep else {"h_RH": None})
                yield product(up_projection_kernel, "up", rows, dtype, label, **constants)
            constants = common | {"ACTIVATION": "swiglu", "a_RF": None}
            yield product(up_projection_kernel, "up", rows, dtype, f"h again{end}", **constants)
            constants = common | {"stride_inner": 1}
            yield product(grouped_matmul_kernel, "matmul", rows, dtype, f"fc2{end}", **constants)
        for even in (True, False):
            ragged = "" if even else ", ragged"
            constants = {"IS_EVEN": even, "stride_output": 1}
            label = f"grad x{ragged}"
            yield product(grouped_matmul_kernel, "matmul", rows, dtype, label, **constants)
            for act in ACTIVATIONS:
                constants = {"ACTIVATION": act, "IS_EVEN": even}
                label = act + ragged
                yield product(grad_hidden_kernel, "grad_hidden", rows, dtype, label, **constants)
    for dtype, by_token, out in itertools.product(TYPES, (True, False), ("same", "adds", "fp32")):
        constants = {"LEFT_IS_BY_TOKEN": by_token, "ADD": out != "same", "CHOICES": 8}
        label = f"{'fc2' if by_token else 'fc1'}, {'adds to fp32' if out == 'fp32' else out}"
        pointers = {"out_SQP": "*fp32"} if out == "fp32" else {}
        kind: Kernel = "weight_grad" if out == "same" else "weight_sum"
        arguments = (weight_grad_kernel, kind, 128, dtype, label)
        yield product(*arguments, **constants, pointers=pointers)
    for dtype, out in itertools.product(TYPES, ({}, {"out_SQ": "*fp32"})):
        for weights, label in (({}, "fc2"), ({"weights_R": None}, "fc1")):
            constants = {"ADD": bool(out), "ROWS": bias_grad.ROWS, "COLUMNS": bias_grad.COLUMNS}
            label += ", adds to fp32" if out else ""
            yield Case(
                bias_grad.bias_grad_kernel, arch, dtype, constants | weights, out, label=label
            )
    for dtype in TYPES:
        yield Case(combine_kernel, arch, dtype, {"COLUMNS": 1024}, label="weighted")
        constants = {"COLUMNS": 1024, "weights_R": None}
        yield Case(combine_kernel, arch, dtype, constants, label="sum")
    yield from _grouping_cases(arch)
    yield from _quantized_cases(arch)
    yield from _router_cases(arch)


def _grouping_cases(arch: int) -> Iterator[Case]:
    block = {"BLOCK_ROWS": grouping.BLOCK_ROWS}
    scan = {"SCAN_BLOCKS": grouping.SCAN_BLOCKS, "SCAN_SLOTS": grouping.SCAN_SLOTS}
    fp32 = torch.float32
    for ids, table in itertools.product(("*i32", "*i64"), ({}, {"slot_of_E": None})):
        label = f"ids {ids[1:]}, {'no table' if table else 'slot table'}"
        constants = block | table
        more = {"label": label, "num_warps": grouping.RANK_WARPS}
        yield Case(grouping.rank_kernel, arch, fp32, constants, {"ids_R": ids}, **more)
        constants = {"FEW_ROWS": group_few.FEW_ROWS} | table
        more = {"label": label, "num_warps": group_few.FEW_WARPS}
        yield Case(group_few.group_few_kernel, arch, fp32, constants, {"ids_R": ids}, **more)
    yield Case(grouping.scan_kernel, arch, fp32, scan)
    for slots in (8, 512):
        constants = {"ALL_SLOTS": slots}
        yield Case(grouping.schedule_kernel, arch, fp32, constants, label=f"{slots} slots")
    yield Case(grouping.permute_kernel, arch, fp32, block)


def _quantized_cases(arch: int) -> Iterator[Case]:
    """Weights in 8 and 4 bits: the usual groups, and those that shorten the steps."""
    formats = ((8, 768, "a scale per row"), (8, 128, "groups of 128"), (8, 32, "groups of 32"))
    formats += ((4, 128, "groups of 128"), (4, 64, "groups of 64"), (4, 32, "groups of 32"))
    for (bits, group_size, groups), dtype in itertools.product(formats, TYPES):
        values = "*i8" if bits == 8 else "*u8"
        label = f"int{bits}, {groups}"
        for rows in (16, 32, 64):
            tiles = quantized_tiles(rows, dtype, group_size)
            constants = {"BITS": bits, "IS_PER_ROW": group_size == 768, "GROUP_TILES": GROUP_TILES}
            constants |= {"PRECISION": PRECISION[dtype], "M": tiles.M, "N": tiles.N, "P": tiles.P}
            for has_bias in (False, True):
                end = ", biased" if has_bias else ""
                for act in ACTIVATIONS:
                    case = constants | {"ACTIVATION": act}
                    case |= {} if has_bias else {"bias_SH": None}
                    pointers = {"values_SHB": values}
                    kernel = quantized_up_kernel
                    yield Case(kernel, arch, dtype, case, pointers, tiles, f"{act}, {label}{end}")
                case = constants | ({} if has_bias else {"bias_SQ": None})
                pointers = {"values_SQB": values}
                kernel = quantized_matmul_kernel
                yield Case(kernel, arch, dtype, case, pointers, tiles, label + end)
        for table in ({}, {"slot_of_E": None}):
            step = min(INPUTS, group_size & -group_size)
            constants = {"BITS": bits, "N": LINES, "P": step} | table
            pointers = {"values_SQB": values, "offsets_E1": "*i32"}
            end = ", no table" if table else ""
            yield Case(dequantize_kernel, arch, dtype, constants, pointers, label=label + end)


ROUTERS = {
    "8 experts": (8, 1),
    "128 experts": (128, 1),
    "256 experts in 8 groups": (256, 8),
    "1024 experts": (1024, 1),
    "990 experts in 33 groups": (990, 33),
}
"""Numbers of experts and groups; the last one has the most lanes."""


def _router_cases(arch: int) -> Iterator[Case]:
    fp32 = torch.float32
    types = {"valid_T": "*i1", "counts_E": "*i64"}
    inference = dict.fromkeys(("bias_E", "valid_T", "part_sums_BE", "part_z_B"))
    for (name, (experts, groups)), kind in itertools.product(ROUTERS.items(), SCORES):
        label = f"{name}, {kind}"
        divisible = frozenset({"num_experts", "group_width"} if experts % 16 == 0 else ())
        rule = {"IS_SIGMOID": kind == "sigmoid", "RENORMALIZE": True}
        rule |= {"CHOICES": 8, "ALL_CHOICES": 8}

        def case(
            kernel: Any,
            lanes: int,
            label: str,
            constants: dict[str, Any],
            divisible: frozenset[str] = divisible,
            rule: dict[str, Any] = rule,
        ) -> Case:
            known = rule | {"M": router.rows_of(lanes)} | constants
            warps = router.warps_of(lanes)
            return Case(kernel, arch, fp32, known, types, None, label, divisible, warps)

        padded, width = router.lanes(experts, groups)
        sizes = {"GROUPS": padded, "WIDTH": width, "GROUP_BEST": 2}
        yield case(router.route_kernel, padded * width, label, sizes)
        without = sizes | inference
        yield case(router.route_kernel, padded * width, f"{label}, inference", without)
        lanes = triton.next_power_of_2(experts)
        yield case(route_grad_kernel, lanes, label, {"N": lanes})
    finish = {"PARTS": router.FINISH_PARTS, "EXPERTS": router.FINISH_EXPERTS}
    yield Case(router.finish_kernel, arch, fp32, finish, types, label="training")
    finish |= dict.fromkeys(("part_sums_BE", "part_z_B", "sums_E", "z_sum"))
    yield Case(router.finish_kernel, arch, fp32, finish, types, label="inference")


def compile_case(case: Case) -> Compiled:
    """Compile a case and read what came out."""
    signature, divisible = {}, {}
    for place, parameter in enumerate(case.kernel.params):
        name = parameter.name
        if name in case.constants:
            signature[name] = "constexpr"
        elif name in SCALAR_POINTERS:
            signature[name] = "*fp32"
        elif name in FLOATS:
            signature[name] = "fp32"
        elif ("_" in name and name.rpartition("_")[2].isupper()) or name in INDEX_POINTERS:
            is_index = name in INDEX_POINTERS
            usual = "*i32" if is_index else f"*{TYPES[case.dtype]}"
            usual = "*fp32" if name in FP32_POINTERS else usual
            usual = "*bf16" if name in BF16_POINTERS else usual
            signature[name] = case.pointers.get(name, usual)
            divisible[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name in case.divisible:
                divisible[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": case.num_warps}
    if case.tiles is not None:
        options = {"num_warps": case.tiles.num_warps, "num_stages": case.tiles.num_stages}
    source = ASTSource(case.kernel, signature, case.constants, divisible)
    made = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    usage = _cuobjdump(made.asm["cubin"], "-res-usage")
    code = _cuobjdump(made.asm["cubin"], "-sass")
    return Compiled(
        case,
        int(re.search(r"REG:(\d+)", usage)[1]),
        int(re.search(r"STACK:(\d+)", usage)[1]),
        made.metadata.shared,
        len(re.findall(r"\bHGMMA\b", code)),
        len(re.findall(r"\bHMMA\b", code)),
    )


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def main() -> int:
    """Print and write the table; fail if a configuration must not ship."""
    head = f"Triton {triton.__version__}, compiled without a GPU by {Path(__file__).name}"
    lines, is_bad = [head], False
    for case in itertools.chain(cases(80), cases(90)):
        compiled = compile_case(case)
        verdict = f"  {', '.join(compiled.problems).upper()}" if compiled.problems else ""
        is_bad |= bool(verdict)
        lines.append(compiled.line + verdict)
        print(lines[-1], flush=True)
    path = Path(__file__).parent / "results" / "triton_registers.txt"
    path.write_text("\n".join(lines) + "\n")
    return 1 if is_bad else 0


if __name__ == "__main__":
    sys.exit(main())
