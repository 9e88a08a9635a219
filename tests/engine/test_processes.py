"""Two processes on the CPU compute what one computes on the doubled batch; how processes are started."""

from __future__ import annotations

import argparse
import atexit
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import create_ddp_model, launch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

from detr_family.data.images import ImageError
from detr_family.engine import processes
from detr_family.engine.processes import run_and_leave

Result = tuple[dict[str, float], dict[str, torch.Tensor]]


def losses_and_gradients(name: str, silent: bool, batches: list[list[dict[str, Any]]], path: str) -> None:
    torch.set_num_threads(1)
    detector = tiny.quiet(name).train()
    for key, parameter in detector.named_parameters():
        if silent and key.endswith(("class_embed.bias", "class_embed.0.bias")):
            parameter.data.fill_(-20.0)
    model = create_ddp_model(detector, broadcast_buffers=False, device_ids=None)
    losses = model(batches[comm.get_rank()])
    sum(losses.values()).backward()
    gathered = comm.gather({k: v.item() for k, v in losses.items()})
    if comm.is_main_process():
        mean = {k: sum(x[k] for x in gathered) / len(gathered) for k in losses}
        gradients = {k.removeprefix("module."): p.grad for k, p in model.named_parameters() if p.requires_grad}
        torch.save((mean, gradients), path)


def in_processes(name: str, silent: bool, batches: list[list[dict[str, Any]]], path: Path) -> Result:
    args = (losses_and_gradients, name, silent, batches, str(path))
    launch(run_and_leave, len(batches), dist_url="auto", args=args)
    return torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.DETECTORS)
@pytest.mark.parametrize("counts", [(3, 2, 1, 3), (3, 2, 0, 0), (0, 0, 0, 0)], ids=str)
def test_two_processes_equal_one_with_the_doubled_batch(name: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    """The second case has a rank without boxes, the third no boxes at all: nothing hangs, nothing is unused.

    The largest number of boxes in an image is the same for both ranks: denoising queries see the empty slots of their
    group, as in the releases, and there are as many as the batch needs. DINO's empty slots are background, and a rank
    without boxes has none: there every class starts at a probability of 2e-9, at which background adds nothing.
    """
    inputs = tiny.batch(counts)
    silent = name == "DINO" and counts == (3, 2, 0, 0)
    one, one_gradients = in_processes(name, silent, [inputs], tmp_path / "one")
    two, two_gradients = in_processes(name, silent, [inputs[:2], inputs[2:]], tmp_path / "two")
    assert one.keys() == two.keys()
    for key in one:
        assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-7), key
    for key, gradient in one_gradients.items():
        torch.testing.assert_close(two_gradients[key], gradient, rtol=1e-3, atol=1e-5, msg=key)


def gradients(name: str, checkpointed: bool) -> dict[str, torch.Tensor]:
    """Of this process, in a DDP wrapper, with dropout."""
    keys = dict.fromkeys(("BACKBONE", "ENCODER", "DECODER"), checkpointed)
    model = tiny.build(name, DROPOUT=0.2, CHECKPOINT=CfgNode(keys)).train()
    wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    torch.manual_seed(comm.get_rank())
    sum(wrapped(tiny.batch((3, comm.get_rank()))).values()).backward()
    return {k: p.grad for k, p in model.named_parameters() if p.requires_grad}


def compare_checkpointed() -> None:
    torch.set_num_threads(1)
    for name in tiny.DETECTORS:
        plain, again = gradients(name, False), gradients(name, True)
        for key, gradient in plain.items():
            assert torch.equal(again[key], gradient), f"{name} {key}"


@pytest.mark.slow
def test_activation_checkpointing_over_processes_changes_no_gradient() -> None:
    launch(run_and_leave, 2, dist_url="auto", args=(compare_checkpointed,))


def test_torchruns_environment_is_followed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(processes, "detectron2_launch", lambda *args, **kwargs: ran.append("detectron2"))
    parser = processes.argument_parser()
    args = parser.parse_args(["--local-rank=0", "--num-gpus", "2", "SEED", "3"])
    assert args.opts == ["SEED", "3"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # as on some clusters, without torchrun
        monkeypatch.setenv(name, "1")
    processes.launch(ran.append, args)
    assert ran == ["detectron2"]
    torchrun = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}
    for name, value in {**torchrun, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit):
        processes.launch(ran.append, args)
    assert "leave out --num-gpus" in capsys.readouterr().err
    processes.launch(ran.append, parser.parse_args([]))
    assert len(ran) == 2 and ran[1].num_gpus == 1


def fail(args: argparse.Namespace) -> None:
    """An error on the last of the processes, while the others wait for it; of the kind that the options name."""
    if comm.get_rank() == comm.get_world_size() - 1:
        if args.opts == ["user"]:
            raise ImageError("The image a.png cannot be read")
        raise ValueError("expected 3 channels")
    comm.synchronize()


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_users_mistake_is_one_line_and_a_bug_keeps_its_traceback(
    count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--num-gpus", str(count), "--dist-url", "auto"]
    parser = processes.argument_parser()
    with pytest.raises(SystemExit) as ended:
        processes.launch(fail, parser.parse_args([*flags, "user"]))
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(": The image a.png cannot be read")
    with pytest.raises(Exception, match="expected 3 channels") as bug:
        processes.launch(fail, parser.parse_args([*flags, "bug"]))
    assert count == 1 or "in fail" in str(bug.value)


def fail_late(args: argparse.Namespace) -> None:
    """As `fail`, and the process takes a while to end, as the others do not."""
    if comm.get_rank() == comm.get_world_size() - 1:
        atexit.register(time.sleep, 5)
        dist.destroy_process_group()  # what its end does to the others, before it
        raise ValueError("expected 3 channels")
    comm.synchronize()


@pytest.mark.slow
def test_a_bug_is_told_though_another_process_ends_before_its_own() -> None:
    flags = ["--num-gpus", "2", "--dist-url", "auto"]
    with pytest.raises(Exception, match=r"(?s)in fail_late.*expected 3 channels") as bug:
        processes.launch(fail_late, processes.argument_parser().parse_args(flags))
    assert bug.value.error_index == 1


def local_groups_of_release_0_6() -> None:
    """Four processes as two machines of two, with a Detectron2 that has no function for it."""
    if hasattr(comm, "create_local_process_group"):
        del comm.create_local_process_group
    comm._LOCAL_PROCESS_GROUP = None
    processes._make_local_group(2)
    assert (comm.get_local_rank(), comm.get_local_size()) == (comm.get_rank() % 2, 2)


@pytest.mark.slow
def test_groups_of_one_machine_without_detectron2s_help() -> None:
    launch(run_and_leave, 4, dist_url="auto", args=(local_groups_of_release_0_6,))


def gloo_threads() -> int:
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)


def talk() -> None:
    model = create_ddp_model(torch.nn.Linear(3, 3), broadcast_buffers=False, device_ids=None)
    model(torch.ones(2, 3)).sum().backward()
    assert len(comm.gather(comm.get_rank())) in (0, 2) and gloo_threads() > 0


def no_thread_outlives_the_run() -> None:
    run_and_leave(talk)
    assert gloo_threads() == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux shows them")
def test_no_thread_of_gloo_is_left_to_abort_the_process() -> None:
    launch(no_thread_outlives_the_run, 2, dist_url="auto")


def test_of_a_killed_process_each_command_says_how_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    killed = ProcessExitedException("killed", error_index=1, error_pid=77, exit_code=-9, signal_name="SIGKILL")
    with pytest.raises(SystemExit):
        processes._leave_several(killed, [], "The same command goes on")
    assert (
        capsys.readouterr()
        .err.rstrip()
        .endswith(
            "was ended by SIGKILL, and the others with it. SIGKILL is what "
            "the system sends where memory runs out. The same command goes on"
        )
    )
