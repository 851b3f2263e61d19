"""The `megarl` command. A command that needs ranks starts its own, unless it already is one (RANK is set)."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from megarl import __version__, launcher
from megarl.cluster.command import app as launch_app
from megarl.errors import EXIT_CODES, BadInput, RunFailed
from megarl.secrets import masked

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Reinforcement learning of Mixture-of-Experts language models: Megatron-core and vLLM in one torchrun.",
    epilog=EXIT_CODES,
)
verify_app = typer.Typer(help="Compare what two engines, layouts or files should agree on.")
app.add_typer(verify_app, name="verify")
study_app = typer.Typer(help="Runs that differ in one thing each, compared with intervals over seeds.")
app.add_typer(study_app, name="study")
app.add_typer(launch_app, name="launch")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the project.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="a.b=c", help="Values that replace the file's.", show_default=False),
]
Nproc = Annotated[
    int | None,
    typer.Option(
        "--nproc", min=1, help="Local ranks (default: the smallest world the layout allows).", show_default=False
    ),
]


def main() -> None:
    """Run a command and exit with one of `EXIT_CODES`; errors are one line on stderr."""
    try:
        code = app(standalone_mode=False, prog_name="megarl") or 0
    except BadInput as e:
        code = _fail(str(e), 2)
    except RunFailed as e:
        code = _fail(_placed(str(e)), 1)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    except SystemExit:
        raise
    except Exception as e:
        code = _fail_usage(e) if hasattr(e, "format_message") else _fail_unexpectedly(e)
    if launcher.is_rank():
        if not code:  # a failed rank must not wait for the others in an exit handler
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # gloo's threads can outlive their owners in an ordinary exit, which then ends in std::terminate
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C while Python shuts down would replace the exit code
    sys.exit(code)


def _fail(line: str, code: int) -> int:
    """Say it once, where a person sees it: through the launcher, or on stderr."""
    line = masked(" ".join(line.split()))
    launcher.report_failure(line, code)
    who = f"rank {os.environ['RANK']}: " if launcher.is_rank() else ""
    print(f"error: {who}{line}", file=launcher.error_stream(), flush=True)
    return code


def _fail_usage(error: Any) -> int:
    """An argument or option that is not there, or is none."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "megarl"
    return _fail(f"{error.format_message().rstrip('.')}; see {command} --help", 2)


def _fail_unexpectedly(error: Exception) -> int:
    text = masked("".join(traceback.format_exception(error)))
    line = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    if launcher.is_rank():
        print(text, file=sys.stderr, flush=True)
        return _fail(_placed(line, error), 1)
    with tempfile.NamedTemporaryFile("w", prefix="megarl-", suffix=".log", delete=False) as log:
        log.write(text)
    return _fail(f"{line} (traceback: {log.name})", 1)


def _placed(line: str, error: Exception | None = None) -> str:
    """An error's line with the step and the phase in which a rank of a run met it."""
    watchdog = sys.modules.get("megarl.trainers.watchdog")
    return line if watchdog is None else watchdog.placed(line, error)


def _resumed(overrides: list[str] | None) -> list[str]:
    """Overrides of a command that trains: ranks that were started again go on from the newest checkpoint."""
    return [*(overrides or ()), *(["resume=auto"] if launcher.is_rank() and launcher.restarts() else [])]


def _run_ranks(config: Any, part: str, nproc: int | None, work: Callable[[], Any]) -> None:
    """In the command a user typed: prepare RUN_DIR/<part> and start the ranks. In a rank: do the work."""
    from megarl.config import check_world, prepare_run_dir, smallest_world

    logs = Path(config.run_dir) / part / "logs"
    if not launcher.is_rank():
        ranks = nproc or config.parallel.nproc or smallest_world(config)
        check_world(config, ranks, "rl" if part == "rl" else None)
        launcher.free_port()
        run = prepare_run_dir(config, part)
        command = [sys.executable, "-m", "megarl", *sys.argv[1:]]
        log, again = config.log, config.parallel.max_restarts
        code = launcher.launch(
            command, ranks, logs, log.grace_seconds, warned_grace_seconds=log.warned_grace_seconds, max_restarts=again
        )
        if code == 2:
            run.discard()
        raise typer.Exit(code)
    check_world(config, int(os.environ["WORLD_SIZE"]), "rl" if part == "rl" else None)
    if not launcher.launched_locally() and os.environ["RANK"] == "0":
        prepare_run_dir(config, part)
    launcher.redirect_rank_output(logs / f"rank{os.environ['RANK']}.log")
    launcher.end_with_torchrun()
    from megarl.trainers.watchdog import Watchdog

    Watchdog(part, logs, config.watchdog)
    calm, warned = config.log.grace_seconds, config.log.warned_grace_seconds
    _work(work, {signal.SIGINT: calm, signal.SIGTERM: warned, signal.SIGUSR1: warned})


def _work(work: Callable[[], Any], grace: dict[int, float] | None = None) -> None:
    from megarl import platform
    from megarl.platform.signals import StopSignal
    from megarl.trainers.watchdog import Watchdog

    stop = StopSignal.install(grace)
    platform.setup()
    try:
        work()
    except (EOFError, OSError) as e:  # the command line library takes these for the end of its own input and output
        raise RuntimeError(f"{type(e).__name__}: {e}") from e
    if Watchdog.current is not None:
        Watchdog.current.close()
    if stop.requested:
        raise typer.Exit(stop.exit_code)


@app.command()
def sft(config: ConfigFile, overrides: Overrides = None, nproc: Nproc = None) -> None:
    """Supervised fine-tuning: the warm start before RL, or continued pre-training.

    Example: [bold]megarl sft configs/cpu/quickstart.yaml sft.steps=100[/bold]
    """
    from megarl.config import load_config

    cfg = load_config(config, _resumed(overrides), require="sft")

    def work() -> None:
        from megarl.trainers import sft as trainer

        trainer.run(cfg)

    _run_ranks(cfg, "sft", nproc, work)


@app.command(name="reward-model")
def reward_model(config: ConfigFile, overrides: Overrides = None, nproc: Nproc = None) -> None:
    """Train a reward model on preferences; RL uses it as a reward of type model.

    Example: [bold]megarl reward-model project.yaml reward_model.steps=100[/bold]
    """
    from megarl.config import load_config

    cfg = load_config(config, _resumed(overrides), require="reward_model")

    def work() -> None:
        from megarl.trainers import reward_model as trainer

        trainer.run(cfg)

    _run_ranks(cfg, "reward_model", nproc, work)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Nproc = None,
    from_rollouts: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Train on trajectories saved in this rollouts/ folder; sample nothing."),
    ] = None,
) -> None:
    """Reinforcement learning: sample, score, update, sync, step after step.

    Example: [bold]megarl train configs/cpu/quickstart.yaml rl.steps=20 run_dir=runs/try[/bold]
    """
    from megarl.config import load_config

    cfg = load_config(config, _resumed(overrides), require="rl")
    _check_reward(cfg)
    if from_rollouts is not None and not from_rollouts.exists():
        raise BadInput(f"--from-rollouts {from_rollouts}: no such folder; give the rollouts/ folder of a run")

    def work() -> None:
        from megarl.trainers import rl as trainer

        trainer.run(cfg, from_rollouts=from_rollouts)

    _run_ranks(cfg, "rl", nproc, work)


@app.command(name="eval")
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Nproc = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Hugging Face or megarl checkpoint (default: the newest of the project)."),
    ] = None,
) -> None:
    """Held-out accuracy: greedy, or avg@k and pass@k with eval.samples=k.

    Example: [bold]megarl eval configs/cpu/quickstart.yaml --checkpoint runs/quickstart/rl/hf eval.samples=8[/bold]
    """
    from megarl.config import load_config

    cfg = load_config(config, overrides or (), require="eval")
    _check_reward(cfg)
    if checkpoint is not None and not checkpoint.is_dir():
        raise BadInput(f"--checkpoint {checkpoint}: no such folder; give a checkpoint folder")

    def work() -> None:
        from megarl.trainers import evaluate as trainer

        trainer.run(cfg, checkpoint=checkpoint)

    _run_ranks(cfg, "eval", nproc, work)


@verify_app.command()
def sync(config: ConfigFile, overrides: Overrides = None, nproc: Nproc = None) -> None:
    """Sync the learner's weights into vLLM and compare every tensor family and the log-probs of both engines.

    Example: [bold]megarl verify sync configs/cpu/quickstart.yaml[/bold]
    """
    from megarl.config import load_config

    cfg = load_config(config, overrides or (), require="sync")

    def work() -> None:
        from megarl.verify.sync import verify_sync

        verify_sync(cfg)

    _run_ranks(cfg, "verify", nproc, work)


@verify_app.command()
def routing(config: ConfigFile, overrides: Overrides = None, nproc: Nproc = None) -> None:
    """Compare the engine's record of experts with the learner's routing, and replay it. Exit code 1 on a difference.

    Example: [bold]megarl verify routing configs/cpu/quickstart.yaml parallel.ep=2[/bold]
    """
    from megarl.config import load_config

    cfg = load_config(config, overrides or (), require="routing")

    def work() -> None:
        from megarl.verify.routing import verify_routing

        verify_routing(cfg)

    _run_ranks(cfg, "verify", nproc, work)


@verify_app.command()
def precision(config: ConfigFile, overrides: Overrides = None) -> None:
    """Hidden states, log-probs and gradient of bfloat16 and every FP8 recipe against float32, layer by layer.

    Example: [bold]megarl verify precision configs/cpu/quickstart.yaml model.fp8_skip_last=1[/bold]
    """
    from megarl.config import load_config
    from megarl.config.schema import Parallel

    cfg = load_config(config, overrides or (), require="model").model_copy(update={"parallel": Parallel()})

    def work() -> None:
        from megarl.verify.precision import verify_precision

        verify_precision(cfg)

    _run_ranks(cfg, "verify", 1, work)


@verify_app.command()
def layouts(
    config: ConfigFile,
    overrides: Overrides = None,
    layouts: Annotated[
        str, typer.Option(metavar="tp2,pp2,...", help="Layouts to compare (default: all that fit).", show_default=False)
    ] = "",
    dtype: Annotated[str, typer.Option(help="float64 (tolerance 1e-10) or float32 (1e-5).")] = "float64",
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes at most.")] = 8,
) -> None:
    """One optimizer step of every loss on a small model of the config's kind: each layout against one process.

    Example: [bold]megarl verify layouts configs/cpu/quickstart.yaml --layouts tp2,pp2vpp2,tp2ep2+recompute[/bold]
    """
    from megarl.config import load_config

    if launcher.is_rank():
        raise BadInput("verify layouts starts its own ranks: run it without torchrun")
    cfg = load_config(config, overrides or (), require="model")
    from megarl.verify.layouts.oracle import verify_layouts

    verify_layouts(cfg, [name for name in layouts.split(",") if name], dtype, nproc)


@verify_app.command(name="layout-rank", hidden=True)
def layout_rank(folder: Path, name: str) -> None:
    """A rank of `verify layouts`."""

    def work() -> None:
        from megarl.verify.layouts.rank import run_layout

        run_layout(folder, name)

    _work(work)


@verify_app.command()
def conversion(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Hugging Face checkpoint folder.", show_default=False)],
    layouts: Annotated[
        str, typer.Option(metavar="one,tp2,...", help="Layouts to go through (default: all that fit).", show_default=False)
    ] = "",
    nproc: Annotated[int, typer.Option("--nproc", min=1, help="Processes at most.")] = 8,
) -> None:
    """Weights through every layout and back in bytes, and log-probs and logits against transformers.

    A model larger than memory: its weights by streaming, logits of a small copy. Exit code 1 on a difference.

    Example: [bold]megarl verify conversion models/Qwen3-30B-A3B --layouts tp2,pp2,ep2[/bold]
    """
    if launcher.is_rank():
        raise BadInput("verify conversion starts its own ranks: run it without torchrun")
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give a checkpoint folder")
    from megarl.verify.conversion import verify_conversion

    verify_conversion(folder, [name for name in layouts.split(",") if name], nproc)


@verify_app.command(name="conversion-rank", hidden=True)
def conversion_rank(folder: Path, name: str) -> None:
    """A rank of `verify conversion`."""

    def work() -> None:
        from megarl.verify.conversion import run_rank

        run_rank(folder, name)

    _work(work)


@verify_app.command(name="resume")
def verify_resume(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each part; the run is resumed after each.")] = 3,
    nproc: Nproc = None,
) -> None:
    """Run every part of the project with and without a stop after each step, on small batches: every bit must agree.

    Weights, optimizer, random generators, data position, metrics and trajectories. Exit code 1 on a difference.

    Example: [bold]megarl verify resume configs/cpu/quickstart.yaml rl.algorithm.preset=dapo[/bold]
    """
    from megarl.config import load_config

    if launcher.is_rank():
        raise BadInput("verify resume starts its own ranks: run it without torchrun")
    given = [*(overrides or ()), *([f"parallel.nproc={nproc}"] if nproc else [])]
    cfg = load_config(config, given, require="model")
    from megarl.verify import resume

    resume.verify_resume(cfg, steps)


@verify_app.command(name="algorithms")
def verify_algorithms(
    vectors: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Vectors to compare with (default: those of this package)."),
    ] = None,
) -> None:
    """Compare losses, gradients and advantages with vectors of an independent float64 reference. Exit code 1 on a miss.

    Example: [bold]megarl verify algorithms --vectors vectors.json[/bold]
    """
    from megarl.verify.algorithms import GOLDEN, compare, render

    rows = compare(vectors or GOLDEN)
    print(render(rows))
    raise typer.Exit(0 if all(row.ok for row in rows) else 1)


@study_app.command()
def drift(
    config: ConfigFile,
    overrides: Overrides = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each arm (default: study.seeds).", show_default=False)
    ] = None,
) -> None:
    """GRPO, GSPO and SAPO with and without routing replay: RESULTS.md and study.html. Finished runs are not made again.

    Example: [bold]megarl study drift configs/studies/drift/study.yaml --seeds 2 rl.steps=10[/bold]
    """
    from megarl.config import load_config

    if launcher.is_rank():
        raise BadInput("study drift starts its own ranks: run it without torchrun")
    given = [*(overrides or ()), *([f"study.seeds={seeds}"] if seeds else [])]
    cfg = load_config(config, given)
    from megarl.study.drift import run_study

    raise typer.Exit(run_study(cfg, given, config))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint folder to read.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    to: Annotated[str, typer.Option(help="hf (safetensors) or megatron (distributed checkpoint).", show_default=False)],
    parallel: Annotated[
        str,
        typer.Option(
            metavar="tp=2,pp=2,ep=2", help="Layout to convert with, a process a rank (default: one).", show_default=False
        ),
    ] = "",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="bf16|fp32|fp8", help="Precision (default: as it is); fp8: in blocks.", show_default=False),
    ] = None,
) -> None:
    """Convert a checkpoint between Hugging Face and Megatron, a layer at a time. The result loads in any layout.

    The same command goes on where a stopped one was.

    Example: [bold]megarl convert runs/quickstart/rl/checkpoints/step_000100 /tmp/model --to hf[/bold]
    """
    import shutil

    if to not in ("hf", "megatron"):
        raise BadInput(f"--to {to}: set hf or megatron")
    if dtype not in (None, "bf16", "fp32", "fp8"):
        raise BadInput(f"--dtype {dtype}: set bf16, fp32 or fp8")
    if dtype == "fp8" and to == "megatron":
        raise BadInput("--dtype fp8: the learner computes in bf16 or fp32; set one of them, or --to hf")
    if not source.is_dir():
        raise BadInput(f"{source}: no such folder; give a checkpoint folder")
    layout, world = _degrees(parallel)
    if not launcher.is_rank():
        if target.exists():
            raise BadInput(f"{target}: exists; give a folder that does not")
        logs = Path(tempfile.mkdtemp(prefix="megarl-convert-"))
        command = [sys.executable, "-m", "megarl", *sys.argv[1:]]
        code = launcher.launch(command, world, logs, 8, env={"CUDA_VISIBLE_DEVICES": ""})
        if code in (0, 2):
            shutil.rmtree(logs)
        raise typer.Exit(code)

    def work() -> None:
        from megarl.learner.convert_checkpoint import Progress, convert_checkpoint
        from megarl.trainers.display import Transfer

        with Transfer(f"convert to {to}", launcher.terminal()) as shown:
            convert_checkpoint(source, target, to, layout, dtype, Progress(shown.start, shown.add, shown.note))

    _work(work)


def _degrees(text: str) -> tuple[Any, int]:
    """The layout that `tp=2,ep=2` says, and its ranks."""
    import math

    from megarl.config import Parallel

    given: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in ("tp", "pp", "vpp", "ep", "etp") or not value.isdigit() or not int(value) or name in given:
            raise BadInput(f"--parallel {text}: {part} is not a degree; give tp, pp, vpp, ep or etp, such as tp=2,ep=2")
        given[name] = int(value)
    parallel = Parallel(**given)
    return parallel, math.lcm(parallel.tp * parallel.pp, parallel.etp * parallel.ep * parallel.pp)


@app.command()
def plan(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="YAML file of the project.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="Ranks (default: those of the configuration).", show_default=False)
    ] = None,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="a100, h100, h200, b200, cpu, or a file that --calibrate wrote.")
    ] = "h100",
    search: Annotated[bool, typer.Option("--search", help="Also the best layouts that fit, best first.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan as a page with bars.")] = None,
    reserve: Annotated[
        float | None,
        typer.Option(min=0, metavar="GIB", help="Of a device, for nobody (default: 4, of a CPU rank 1).", show_default=False),
    ] = None,
    prompt_tokens: Annotated[
        float | None, typer.Option(min=1, help="Mean prompt (default: a quarter of the longest).", show_default=False)
    ] = None,
    response_tokens: Annotated[
        float | None, typer.Option(min=1, help="Mean response (default: half of the longest).", show_default=False)
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure this machine, with --gpus ranks at once, for --gpu FILE.")
    ] = None,
) -> None:
    """Bytes by owner and seconds of every phase of an RL step, on hardware that need not be there. Builds the real modules.

    Exit code 2, with what would fit, when it does not.

    Example: [bold]megarl plan configs/recipes/qwen3-30b-a3b-gspo.yaml --gpus 32 --gpu h200 parallel.recompute=none[/bold]
    """
    if launcher.is_rank():
        raise BadInput("plan simulates its ranks: run it without torchrun")
    if calibrate is not None:
        from megarl.plan.calibrate import calibrate as measure
        from megarl.plan.shown import describe_hardware

        found = measure(gpus or 1)
        found.save(calibrate)
        print("\n".join([*describe_hardware(found), f"written: {calibrate}"]))
        return
    if config is None:
        raise BadInput("plan: CONFIG is missing; give a YAML file, or --calibrate FILE")
    from megarl.config import load_config
    from megarl.plan.hardware import named

    chip = named(gpu)
    cfg = load_config(config, [*(overrides or ()), *([f"parallel.nproc={gpus}"] if gpus else [])], require="model")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # simulated devices are the same on every machine
    from megarl.plan.command import make_plan, run

    run(make_plan(cfg, gpus, chip, reserve, prompt_tokens, response_tokens, search), config, html)


@app.command()
def replay(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="RUN_DIR/rl/failed/step_NNNNNN_rankR.safetensors.", show_default=False),
    ],
    overrides: Overrides = None,
) -> None:
    """Micro-batches of an optimizer step that failed, alone: loss, gradient norm, and the first tensor not finite.

    With the run's config and its newest checkpoint before that step, in one process. Exit code 1 when one is not finite.

    Example: [bold]megarl replay runs/quickstart/rl/failed/step_000012_rank1.safetensors[/bold]
    """
    import shutil

    from megarl.config import load_config

    if not file.is_file():
        raise BadInput(f"{file}: no such file; give one of RUN_DIR/rl/failed/")
    part = file.absolute().parent.parent
    if part.name not in ("sft", "reward_model", "rl") or not (part.parent / "config.yaml").is_file():
        raise BadInput(f"{file}: not in RUN_DIR/rl/failed/ of a run with its config.yaml; leave it where it was written")
    cfg = load_config(part.parent / "config.yaml", [*(overrides or ()), f"run_dir={part.parent}"], require=part.name)
    if not launcher.is_rank():
        logs = Path(tempfile.mkdtemp(prefix="megarl-replay-"))
        code = launcher.launch([sys.executable, "-m", "megarl", *sys.argv[1:]], 1, logs, 8)
        if code in (0, 2):
            shutil.rmtree(logs)
        raise typer.Exit(code)

    def work() -> None:
        from megarl.trainers.replay import replay as run_again

        result = run_again(cfg, file.absolute())
        print("\n".join(result.lines()), file=launcher.terminal())
        if result.first is not None:
            raise RunFailed(f"{file}: the first tensor that is not finite is {result.first}")

    _work(work)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.")]) -> None:
    """Write RUN_DIR/report.html: one self-contained file with plots and sample responses.

    Example: [bold]megarl report runs/quickstart[/bold]
    """
    if not run_dir.is_dir():
        raise BadInput(f"{run_dir}: no such folder; give the run_dir of a run")
    from megarl.report import write_report

    print(write_report(run_dir))


@app.command(name="config")
def show_config(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print every resolved field as YAML, its meaning, and whether it is a default, from the file or an override.

    Example: [bold]megarl config configs/cpu/quickstart.yaml rl.steps=20[/bold]
    """
    from megarl.config import describe, resolve

    resolved = resolve(config, overrides or ())
    print("\n".join(describe(resolved)))
    if resolved.config.rl is not None:
        from megarl.algorithms import describe_algorithm

        print("\n".join(f"# {line}" for line in describe_algorithm(resolved.config)))


@app.command()
def doctor() -> None:
    """Device, versions, what is missing and what each absence costs. Exit code 1 if something required is missing.

    Example: [bold]megarl doctor[/bold]
    """
    from megarl.verify.doctor import examine

    lines, healthy = examine()
    print("\n".join(lines))
    raise typer.Exit(0 if healthy else 1)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())


def _check_reward(config: Any) -> None:
    from megarl.rewards.registry import check_reward

    check_reward(config.reward)
