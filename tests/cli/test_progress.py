import contextlib
import io
import logging
import os
import shlex
import signal
from types import SimpleNamespace

import pytest

from hf_ortho.cli.console import PlainConsole, quiet
from hf_ortho.cli.main import LAUNCHED
from hf_ortho.cli.progress import announced, counted, progress, telling_what_is_kept, trainer_log, trainer_progress
from hf_ortho.training import ActivationTrainer

logger = logging.getLogger("hf_ortho")


@pytest.fixture
def flags(gpt2_folder, text_file, tmp_path):
    flags = ["finetune", "--model", gpt2_folder, "--dataset", text_file, "--activation", "hermite_3", "--use-cpu", True]
    flags += ["--max-steps", 4, "--save-steps", 2, "--per-device-train-batch-size", 2, "--logging-steps", 2]
    return [*map(str, flags), "--calibration-samples", "2", "--output-dir", str(tmp_path / "out")]


def test_a_training_says_what_it_does(hf_ortho_command, flags, gpt2_folder, text_file):
    ran = hf_ortho_command(*flags)
    assert ran.code == 0, ran.err
    found = [line.split(":")[0] for line in ran.out.splitlines()[:12]]
    assert found[:7] == [
        f"Loading {gpt2_folder}",
        f"Tokenizing {text_file}",
        f"Running {gpt2_folder} on the calibration data",
        "Fitting hermite_3 to 2 activations",
        "Comparing the converted model with its source",
        "First evaluating on 9 samples",
        "Training on 83 blocks of 32 tokens for 4 steps",
    ]
    assert found[7:10] == ["Training", "Training", "Evaluating on 9 samples"]


@pytest.mark.parametrize(("rank", "printed"), [("0", "Loading it\n"), ("1", "")])
def test_the_main_process_alone_prints(monkeypatch, capsys, rank, printed):
    monkeypatch.setenv("RANK", rank)
    with announced():
        logger.info("Loading it")
    assert capsys.readouterr().out == printed
    logger.info("Loading it")
    assert capsys.readouterr().out == ""


def test_notes_are_printed_as_without_it(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with announced():
        logger.warning("note: this is one")
    assert capsys.readouterr() == ("", "note: this is one\n")


def test_deepspeed_is_quiet(monkeypatch):
    """Accelerate imports it if it is installed; it warns about a machine without a GPU."""
    logger = pytest.importorskip("deepspeed.utils.logging").logger
    monkeypatch.setattr(logger, "level", logging.WARNING)
    quiet()
    assert logger.level == logging.ERROR


# ---- interruption --------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupt(monkeypatch):
    """``interrupt(3)``: in the third step, this process gets the signal of Ctrl-C."""

    def at(step, number=signal.SIGINT):
        steps, training_step = 0, ActivationTrainer.training_step

        def interrupted(self, *args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == step:
                os.kill(os.getpid(), number)
            return training_step(self, *args, **kwargs)

        monkeypatch.setattr(ActivationTrainer, "training_step", interrupted)

    return at


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_interrupted_names_its_checkpoint(hf_ortho_command, flags, interrupt, tmp_path, number):
    interrupt(4, number)
    ran = hf_ortho_command(*flags)
    again = f"{shlex.join(['hf-ortho', *flags])} --resume-from-checkpoint auto"
    assert (ran.code, ran.err) == (
        130,
        f"hf-ortho: interrupted; {tmp_path / 'out'} keeps checkpoint-2; to continue: {again}\n",
    )
    assert "Traceback" not in ran.out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ran = hf_ortho_command(*shlex.split(again)[1:])
    assert ran.code == 0, ran.err
    assert "Resuming from checkpoint-2\n" in ran.out


@pytest.mark.slow
def test_a_training_without_a_checkpoint_says_so(hf_ortho_command, flags, interrupt):
    interrupt(2)
    ran = hf_ortho_command(*flags)
    again = f"{shlex.join(['hf-ortho', *flags])} --resume-from-checkpoint auto"
    message = f"hf-ortho: interrupted before the first checkpoint; to start again: {again}\n"
    assert (ran.code, ran.err) == (130, message)
    ran = hf_ortho_command(*shlex.split(again)[1:])
    assert ran.code == 0, ran.err


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("1", False)])
def test_a_launched_training_names_the_command_that_launched_it(
    hf_ortho_command, flags, interrupt, tmp_path, monkeypatch, rank, printed
):
    """Its launcher does not know the checkpoint; the other processes say nothing."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv(LAUNCHED, "hf-ortho finetune --accelerate-config multi_gpu --config x.yaml")
    monkeypatch.setenv("RANK", rank)
    interrupt(4)
    ran = hf_ortho_command(*flags)
    assert ran.code == 130
    command = "hf-ortho finetune --accelerate-config multi_gpu --config x.yaml --resume-from-checkpoint auto\n"
    assert ran.err == (
        f"hf-ortho: interrupted; {tmp_path / 'out'} keeps checkpoint-2; to continue: {command}" if printed else ""
    )


def test_a_second_signal_does_not_disturb_the_report():
    def kept():
        os.kill(os.getpid(), signal.SIGINT)
        return "interrupted; all is kept"

    with pytest.raises(KeyboardInterrupt, match="interrupted; all is kept"), telling_what_is_kept(kept):
        raise KeyboardInterrupt
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_unknown_total_is_a_question_mark(capsys):
    with progress("counting") as (bar, task):
        bar.update(task, completed=3)
    assert "3/?" in capsys.readouterr().out


def test_the_bar_of_a_conversion_ends_with_it(monkeypatch):
    out = io.StringIO()
    terminal = PlainConsole(file=out, force_terminal=True, width=80)
    monkeypatch.setattr("hf_ortho.cli.progress.console", terminal)
    with contextlib.suppress(KeyboardInterrupt), counted([{}, {}]) as batches:
        assert (len(batches), list(batches)) == (2, [{}, {}])
        raise KeyboardInterrupt
    assert "Converting" in out.getvalue()
    assert out.getvalue().endswith("\x1b[?25h")  # the cursor is back
    with counted(None) as batches:
        assert batches is None


def test_each_evaluation_has_its_own_bar():
    """One during the training disappears; one after it takes the place of the bar of the training."""
    bar, state, batches = trainer_progress("first"), SimpleNamespace(max_steps=2, global_step=0), [1, 2]
    with announced():
        bar.on_train_begin(None, state, None)
        bar.on_prediction_step(None, state, None, eval_dataloader=batches)
        bar.on_prediction_step(None, state, None, eval_dataloader=batches)
        assert [(task.description, task.completed, task.total) for task in bar.bar.tasks] == [
            ("first", 0, 2),
            ("Evaluating", 2, 2),
        ]
        bar.on_evaluate(None, state, None)
        assert [task.description for task in bar.bar.tasks] == ["first"]
        bar.on_train_end(None, state, None)
        bar.on_prediction_step(None, state, None, eval_dataloader=batches)
        assert [(task.description, task.completed, task.total) for task in bar.bar.tasks] == [("Evaluating", 1, 2)]
        bar.on_evaluate(None, state, None)
        assert not bar.bar.live.is_started


def test_a_long_training_without_a_terminal_tells_its_step(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    lines, state = trainer_log("Training"), SimpleNamespace(max_steps=40, global_step=0, is_world_process_zero=True)
    lines.on_train_begin(None, state, None)
    for now, state.global_step in ((50.0, 5), (100.0, 10), (150.0, 15)):  # noqa: B007
        lines.on_step_end(None, state, None)
    assert capsys.readouterr().out == "Training: step 10/40, about 5 min left\n"


def test_no_progress_bar_is_left_open():
    """It would hide the cursor of the terminal, and take the place of the bar of the next training."""
    first, second = trainer_progress("first"), trainer_progress("second")
    state = SimpleNamespace(max_steps=2, global_step=0)
    with announced():
        first.on_train_begin(None, state, None)
        second.on_train_begin(None, state, None)
        assert [each.bar.live.is_started for each in (first, second)] == [False, True]
    assert not second.bar.live.is_started
