"""The files for clusters agree with our commands, with torchrun's and Ray's, and in themselves.

No cluster is there to run them on. The Slurm script runs with a fake srun and scontrol.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from moeyard.configuration import read_values
from moeyard.serving.proxy_guard import CALLBACK, CALLBACK_VARIABLE
from moeyard.serving.serve_args import ServeArgs
from moeyard.training.key_check import check_keys

from launch import ROOT, environment, free_port

FOLDER = ROOT / "configs" / "cluster"
SLURM = FOLDER / "train.slurm"

FAKES = {
    "scontrol": """#!/bin/bash
[ "$*" = "show hostnames node[0-1]" ] && printf '127.0.0.1\\nlocalhost\\n'
""",
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
    SLURM_NODEID=$node SLURMD_NODENAME=127.0.0.1 "$@" > "$LOGS/$node.txt" 2>&1 &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || status=1; done
exit ${status:-0}
""",
    "torchrun": """#!/bin/bash
printf '%s\\0' "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" "$@"
""",
    "real_torchrun": f"""#!/bin/bash
exec {sys.executable} -m torch.distributed.run "$@"
""",
}


def sbatch(folder: Path, *arguments: str, torchrun: str = "torchrun", **extra: str) -> list[str]:
    """Run the script as Slurm would on the first of two nodes; return each node's output."""
    tools = folder / "bin"
    tools.mkdir(parents=True)
    for name in ("scontrol", "srun", torchrun):
        file = tools / name.removeprefix("real_")
        file.write_text(FAKES[name])
        file.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "77"}
    paths = {"PATH": f"{tools}:{os.environ['PATH']}", "LOGS": str(folder)}
    done = subprocess.run(
        ["bash", str(SLURM), *arguments],
        env=environment(**slurm, **paths, **extra),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    outputs = [(folder / f"{node}.txt").read_text() for node in range(2)]
    assert done.returncode == 0, done.stderr + "".join(outputs)
    return outputs


def directives() -> dict[str, str]:
    """Return what the script asks Slurm for."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", SLURM.read_text(), re.MULTILINE))


def test_the_slurm_script_starts_one_torchrun_on_each_node(tmp_path):
    ranks = directives()["gpus-per-node"]
    outputs = sbatch(tmp_path, "run.yaml", "run_dir=a b", SLURM_GPUS_ON_NODE=ranks)
    assert directives()["ntasks-per-node"] == "1"
    for node, output in enumerate(outputs):
        shutdown_s, *arguments = output.split("\0")[:-1]
        given = get_args_parser().parse_args(arguments)
        assert (given.nnodes, given.nproc_per_node) == ("2", ranks)
        assert (given.rdzv_backend, given.rdzv_id) == ("c10d", "77")
        assert given.rdzv_endpoint == "127.0.0.1:29500"
        assert given.rdzv_conf == f"is_host={'true' if node == 0 else 'false'}"
        assert given.local_addr == "127.0.0.1" and given.max_restarts > 0
        assert given.module and given.training_script == "moeyard.training"
        assert given.training_script_args == ["run.yaml", "run_dir=a b"]
        name, seconds = directives()["signal"].split("@")
        assert name == "TERM" and int(shutdown_s) < int(seconds), "ranks have the time to save"


@pytest.mark.slow
@pytest.mark.dist
def test_the_slurm_script_trains_on_two_nodes_of_the_loopback(tmp_path, config_file):
    arguments = [str(config_file), f"run_dir={tmp_path}/run", "train.steps=3", "parallel.ep=2"]
    outputs = sbatch(
        tmp_path / "job",
        *arguments,
        torchrun="real_torchrun",
        PORT=str(free_port()),
        GLOO_SOCKET_IFNAME="lo",
    )
    assert "event=evaluated step=3" in "".join(outputs)
    assert "ranks=2 ep=2" in "".join(outputs)
    assert (tmp_path / "run" / "latest").read_text() == "step-00000003\n"


def documents(name: str) -> tuple[dict, dict]:
    """Return a manifest, and the network policy that goes with it."""
    manifest, policy = yaml.safe_load_all((FOLDER / name).read_text())
    assert policy["kind"] == "NetworkPolicy"
    return manifest, policy["spec"]


def check_pod(template: dict, policy: dict, *, grace_s: float) -> dict:
    """Check what all our pods have in common; return the container."""
    pod, (container,) = template["spec"], template["spec"]["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["automountServiceAccountToken"] is False
    closed = container["securityContext"]
    assert closed["readOnlyRootFilesystem"] and closed["allowPrivilegeEscalation"] is False
    assert closed["capabilities"] == {"drop": ["ALL"]}
    assert container["image"] == "REGISTRY/moeyard:TAG", "the user's to fill in"
    assert pod.get("terminationGracePeriodSeconds", 30) >= grace_s
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    variables = {variable["name"]: variable for variable in container["env"]}
    assert variables["HOME"]["value"] == mounts["tmp"], "kernels are compiled there"
    labels = template["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert policy["ingress"][0] == {"from": [{"podSelector": {"matchLabels": labels}}]}
    assert policy["policyTypes"] == ["Ingress"]
    return container


def test_the_jobset_agrees_with_torchrun_and_with_itself(tmp_path):
    manifest, policy = documents("train-jobset.yaml")
    name, spec = manifest["metadata"]["name"], manifest["spec"]
    (job,) = spec["replicatedJobs"]
    nodes = job["template"]["spec"]
    (torchrun,) = nodes["template"]["spec"]["containers"]
    arguments = [argument.replace("$(NODE_RANK)", "1") for argument in torchrun["args"]]
    given = get_args_parser().parse_args(arguments)
    container = check_pod(nodes["template"], policy, grace_s=given.shutdown_timeout)
    assert container["command"] == ["torchrun"]
    assert nodes["completionMode"] == "Indexed" and job["replicas"] == 1
    assert int(given.nnodes) == nodes["parallelism"] == nodes["completions"]
    assert int(given.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    subdomain = spec["network"]["subdomain"]
    assert spec["network"]["enableDNSHostnames"]
    assert given.master_addr == f"{name}-{job['name']}-0-0.{subdomain}"
    assert [port["containerPort"] for port in container["ports"]] == [given.master_port]
    assert given.node_rank == 1
    source = container["env"][0]["valueFrom"]["fieldRef"]["fieldPath"]
    assert container["env"][0]["name"] == "NODE_RANK" and "job-completion-index" in source
    assert given.module and given.training_script == "moeyard.training"
    config, *overrides = given.training_script_args
    assert config.startswith("/shared/") and "run_dir=/shared/runs/one" in overrides
    (tmp_path / "run.yaml").write_text("model: {}\n")
    check_keys(read_values(tmp_path / "run.yaml", overrides))


def test_the_rayservice_agrees_with_our_application_and_with_itself():
    manifest, policy = documents("serve-rayservice.yaml")
    spec = manifest["spec"]["rayClusterConfig"]
    serve = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    local = yaml.safe_load((ROOT / "configs" / "serve" / "local.yaml").read_text())
    (application,), (tested,) = serve["applications"], local["applications"]
    assert application["import_path"] == tested["import_path"]
    assert application["route_prefix"] == tested["route_prefix"]
    args = ServeArgs.model_validate(application["args"])
    (deployment,) = application["deployments"]
    assert deployment["name"] == tested["deployments"][0]["name"]
    (group,) = spec["workerGroupSpecs"]
    assert group["replicas"] == group["maxReplicas"] == deployment["num_replicas"]
    head = check_pod(spec["headGroupSpec"]["template"], policy, grace_s=0)
    worker = check_pod(group["template"], policy, grace_s=args.drain_timeout)
    num_cpus = deployment["ray_actor_options"]["num_cpus"]
    assert args.num_threads == num_cpus < worker["resources"]["limits"]["cpu"] < 2 * num_cpus
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    port = serve["http_options"]["port"]
    assert {"name": "serve", "containerPort": port} in worker["ports"]
    assert {"port": port} in policy["ingress"][2]["ports"]
    for container in (head, worker):
        variables = {variable["name"]: variable for variable in container["env"]}
        assert variables[CALLBACK_VARIABLE]["value"] == CALLBACK
        assert variables["MOEYARD_API_KEY"]["valueFrom"]["secretKeyRef"]
    assert spec["authOptions"] == {"mode": "token"}
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert spec["rayVersion"] == pinned[1]


def test_numbers_of_grace_periods_are_in_the_page(tmp_path):
    page = (ROOT / "docs" / "multi-node.md").read_text()
    for path in FOLDER.iterdir():
        assert path.name in page
    assert json.dumps(directives()["signal"]).strip('"') in page
