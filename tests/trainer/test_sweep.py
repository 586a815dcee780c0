"""A sweep over alphas and seeds: what its runs share, how it goes on, what it refuses, and its statistics."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from scorer.errors import ConfigurationError
from trainer import sweep, sweep_report
from trainer.sweep import Sweep, last_logged, parse_flags
from trainer.sweep_record import by_name, new_record
from trainer.sweep_results import Cell, Run, alpha_text, estimate, paired_difference, read_results, summarize

ROOT = Path(__file__).parents[2]
T_1, T_2, T_4 = 12.7062, 4.30265, 2.77645
"""Quantiles 0.975 of Student's t with 1, 2 and 4 degrees of freedom, from a printed table."""


def run(alpha, seed, uniform, own=3.0, **more):
    return Run(Cell(alpha, seed), {"eval_uniform_loss": uniform, "eval_own_loss": own, **more})


class TestEstimate:
    @pytest.mark.parametrize(
        ("values", "mean", "half_width"),
        [
            ([1.0, 3.0], 2.0, T_1),  # s = sqrt(2), over sqrt(2)
            ([1.0, 2.0, 3.0], 2.0, T_2 / math.sqrt(3)),
            ([2.0, 4.0, 6.0, 8.0, 10.0], 6.0, T_4 * math.sqrt(10) / math.sqrt(5)),
            ([5.0, 5.0, 5.0], 5.0, 0.0),
        ],
    )
    def test_is_the_mean_and_half_of_its_t_interval(self, values, mean, half_width):
        found = estimate(values)
        assert found.mean == mean
        assert found.half_width == pytest.approx(half_width, rel=1e-5)
        assert found.count == len(values)

    def test_of_one_value_has_no_interval(self):
        found = estimate([1.5])
        assert (found.mean, found.half_width, found.count) == (1.5, None, 1)

    def test_of_a_diverged_run_is_no_number(self):
        assert math.isnan(estimate([1.0, math.nan]).mean)


class TestPairedDifference:
    def test_is_over_differences_of_one_seed(self):
        """Seeds vary by 3 nats, differences by 0.1: -0.1, -0.2, -0.3, in whatever order the runs come."""
        runs_ = [run(0.0, 2, 3.7), run(0.0, 0, 0.9), run(0.0, 1, 1.8)]
        reference = [run(math.inf, seed, loss) for seed, loss in enumerate([1.0, 2.0, 4.0])]
        found = paired_difference(runs_, reference)
        assert found.mean == pytest.approx(-0.2)
        assert found.half_width == pytest.approx(T_2 * 0.1 / math.sqrt(3), rel=1e-5)

    def test_leaves_out_seeds_that_only_one_has(self):
        found = paired_difference([run(0.0, 0, 1.0), run(0.0, 5, 9.0)], [run(math.inf, 0, 1.5), run(math.inf, 6, 9.0)])
        assert (found.mean, found.half_width, found.count) == (-0.5, None, 1)

    def test_of_no_common_seed_is_none(self):
        assert paired_difference([run(0.0, 0, 1.0)], [run(math.inf, 1, 1.0)]) is None


class TestSummary:
    def test_compares_with_inf_wherever_it_stands(self):
        results = summarize([run(0.0, 0, 1.0), run(math.inf, 0, 1.25)])
        assert results.reference == math.inf
        assert [summary.alpha for summary in results.summaries] == [0.0, math.inf]
        assert [summary.difference and summary.difference.mean for summary in results.summaries] == [-0.25, None]

    def test_compares_with_the_first_alpha_without_inf(self):
        results = summarize([run(0.005, 0, 1.0), run(0.0, 0, 1.25)])
        assert results.reference == 0.005
        assert [summary.difference and summary.difference.mean for summary in results.summaries] == [None, 0.25]

    def test_has_only_metrics_that_all_runs_of_an_alpha_have(self):
        results = summarize([run(0.0, 0, 1.0, eval_hardness_loss=2.0), run(0.0, 1, 1.0)])
        assert set(results.summaries[0].metrics) == {"eval_uniform_loss", "eval_own_loss"}

    def test_is_plain_json(self):
        found = summarize([run(math.inf, 0, 1.0), run(0.001, 0, math.nan)], [Cell(math.inf, 1)]).to_json()
        value = json.loads(json.dumps(found, allow_nan=False))
        assert [(run_["alpha"], run_["seed"]) for run_ in value["runs"]] == [("inf", 0), (0.001, 0)]
        assert value["runs"][1]["eval_uniform_loss"] == "nan"
        assert value["reference_alpha"] == "inf"
        assert value["missing"] == [{"alpha": "inf", "seed": 1}]
        assert value["summary"][0]["eval_uniform_loss"] == {"mean": 1.0, "half_width": None, "count": 1}


@pytest.mark.parametrize(
    ("alpha", "text"),
    [(math.inf, "inf"), (0.0, "0"), (-0.0, "0"), (1.0, "1"), (0.001, "0.001"), (1e-05, "1e-05"), (1 / 3, repr(1 / 3))],
)
def test_an_alpha_has_one_exact_spelling(alpha, text):
    assert alpha_text(alpha) == text
    assert float(text) == alpha


# The report -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def results():
    return summarize(
        [
            run(math.inf, 0, 1.0, 1.0),
            run(math.inf, 1, 3.0, 3.0),
            run(0.001, 0, 0.75, 2.5),
            run(0.001, 1, 2.25, 3.5),
            run(0.0, 1, 2.5, 4.5),
        ],
        [Cell(0.0, 0)],
    )


class TestReport:
    def test_has_a_row_for_each_alpha(self, results):
        headers, rows = sweep_report.table(results)
        assert headers == ["alpha", "seeds", "uniform\nmasks", "own\nmasks", "uniform masks,\nminus alpha = inf"]
        assert rows == [
            ["inf", "2", "2.000 ± 12.706", "2.000 ± 12.706", "–"],
            ["0.001", "2", "1.500 ± 9.530", "3.000 ± 6.353", "-0.500 ± 3.177"],
            ["0", "1", "2.500 ± ?", "4.500 ± ?", "-0.500 ± ?"],
        ]

    def test_says_what_has_no_interval_and_what_is_missing(self, results):
        notes = sweep_report.notes(results)
        assert "one value gives no interval" in notes
        assert "Not finished: alpha = 0, seed = 0." in notes

    def test_says_over_how_many_pairs_a_difference_is(self):
        runs_ = [run(math.inf, 0, 1.0), run(math.inf, 1, 1.0), *(run(0.0, seed, 2.0) for seed in (1, 2, 3))]
        _, rows = sweep_report.table(summarize(runs_))
        assert rows[1][-1] == "+1.000000 ± ?, 1 pair"
        assert "one value gives no interval" in sweep_report.notes(summarize(runs_))

    def test_shows_hardness_masks_where_runs_have_them(self):
        headers, rows = sweep_report.table(summarize([run(0.0, 0, 1.0, eval_hardness_loss=3.5)]))
        assert rows == [["0", "1", "1.0000 ± ?", "3.0000 ± ?", "3.5000 ± ?"]]
        assert headers[-1] == "hardness\nmasks"

    def test_has_as_many_decimals_as_an_interval_is_worth(self):
        _, rows = sweep_report.table(summarize([run(0.0, seed, 1 + seed * 1e-5) for seed in range(3)]))
        assert rows[0][2] == "1.000010 ± 0.000025"

    def test_survives_a_diverged_run(self):
        diverged = summarize([run(math.inf, 0, 1.0), run(math.inf, 1, math.nan), run(0.0, 0, math.nan)])
        assert sweep_report.table(diverged)[1][0][2] == "nan ± nan"
        assert sweep_report.png(diverged).startswith(b"\x89PNG")

    def test_in_markdown_is_one_table(self, results):
        lines = [line for line in sweep_report.markdown(results).splitlines() if line.startswith("|")]
        assert len(lines) == 5
        assert {line.count("|") for line in lines} == {6}
        assert lines[0] == "| alpha | seeds | uniform masks | own masks | uniform masks, minus alpha = inf |"

    def test_figure_has_inf_last_and_units_on_its_axes(self, results):
        axes = sweep_report.figure(results).axes
        assert len(axes) == 3
        for one in axes:
            assert [label.get_text().split()[0] for label in one.get_xticklabels()] == ["0", "0.001", "inf"]
            assert one.get_xlabel() == "alpha"
            assert "nats" in one.get_ylabel()

    def test_figure_shows_every_seed(self, results):
        drawn = {tuple(line.get_ydata()) for line in sweep_report.figure(results).axes[0].lines}
        assert (2.5, 2.25, 3.0) in drawn
        assert any(math.isnan(heights[0]) and heights[1:] == (0.75, 1.0) for heights in drawn)


# The command, over runs that only write results -----------------------------------------------------------------------

FAKE_RUN = """
import json, os, sys, time
from pathlib import Path
folder, alpha, seed, behaviour = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
print("a line of the run", flush=True)
(folder / "all_results.json").write_text(json.dumps({"train_loss": 1.0}))
if behaviour:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60) if behaviour == ["sleep"] else sys.exit(int(behaviour[0]))
(folder / "all_results.json").write_text(json.dumps({"eval_uniform_loss": 1.0 + seed, "eval_own_loss": 2.0}))
"""


def fake_command(self, cell):
    """In place of Sweep.command: BEHAVIOUR_<run> in the environment is a time to sleep or an exit code."""
    behaviour = os.environ.get(f"BEHAVIOUR_{cell.name}")
    folder = self.output / cell.name
    return ["-c", FAKE_RUN, str(folder), str(cell.alpha), str(cell.seed), *([behaviour] if behaviour else [])]


@pytest.fixture
def faked(monkeypatch, write_shards, run_in_process, tmp_path):
    """faked(flags…) runs a sweep whose runs take milliseconds: (exit code, standard output, standard error)."""
    monkeypatch.setattr(Sweep, "command", fake_command)
    monkeypatch.setattr(sweep, "_check_flags", lambda _: None)
    monkeypatch.setattr(sweep_report, "png", lambda _: b"a figure")
    monkeypatch.setenv("COLUMNS", "200")
    shards = write_shards([3])
    output = tmp_path / "sweep"

    def faked(*flags, shards=shards):
        return run_in_process(sweep.main, "--shards", shards, "--output_dir", output, *flags)

    faked.output = output
    return faked


GRID = ("--alphas", "inf", "0.001", "--seeds", "0", "1")


def written(output):
    """When each run's results were written, by the run's name."""
    return {path.parent.name: path.stat().st_mtime_ns for path in output.glob("*/all_results.json")}


class TestCommand:
    def test_makes_a_folder_for_each_run_and_reports(self, faked):
        code, printed, _ = faked(*GRID)
        assert code == 0
        names = {f"alpha-{alpha}-seed-{seed}" for alpha in ("inf", "0.001") for seed in (0, 1)}
        assert set(written(faked.output)) == names
        assert {path.name for path in faked.output.iterdir()} - names == {
            *("sweep.json", "sweep_results.json", "sweep.md", "sweep.png")
        }
        assert (faked.output / "alpha-inf-seed-1" / "log.txt").read_text().count("a line of the run\n") == 1
        assert "[4/4]" in printed
        assert "+0.000000 ± 0.000000" in printed

    def test_runs_nothing_again_that_is_finished(self, faked):
        faked(*GRID)
        before = written(faked.output)
        code, printed, _ = faked(*GRID)
        assert code == 0
        assert printed.count("done before") == 4
        assert written(faked.output) == before

    def test_runs_again_what_has_only_training_metrics(self, faked):
        faked(*GRID)
        half = faked.output / "alpha-inf-seed-1" / "all_results.json"
        for text in ('{"train_loss": 1.0}', '{"eval_uniform_loss": 1.0, "ev'):
            half.write_text(text)
            code, printed, _ = faked(*GRID)
            assert code == 0
            assert printed.count("done before") == 3
            assert "eval_own_loss" in json.loads(half.read_text())

    def test_grows_by_alphas_and_seeds(self, faked):
        faked(*GRID)
        before = written(faked.output)
        assert faked("--alphas", "0", "--seeds", "2")[0] == 0
        after = written(faked.output)
        assert after.items() >= before.items()
        assert set(after) - set(before) == {"alpha-0-seed-2"}
        record = json.loads((faked.output / "sweep.json").read_text())
        assert (record["alphas"], record["seeds"]) == (["inf", 0.001, 0], [0, 1, 2])
        assert len(read_results(faked.output).runs) == 5
        assert len(read_results(faked.output).missing) == 4

    def test_names_the_log_of_a_run_that_fails_and_goes_on_from_there(self, faked, monkeypatch):
        monkeypatch.setenv("BEHAVIOUR_alpha-0.001-seed-0", "3")
        code, printed, error = faked(*GRID)
        assert code == 1
        assert "a line of the run" in printed
        assert "the run alpha = 0.001, seed = 0 ended with exit code 3" in error
        assert str(faked.output / "alpha-0.001-seed-0" / "log.txt") in error
        before = written(faked.output)
        assert set(before) == {"alpha-inf-seed-0", "alpha-0.001-seed-0"}  # nothing after it has begun
        monkeypatch.delenv("BEHAVIOUR_alpha-0.001-seed-0")
        assert faked(*GRID)[0] == 0
        assert written(faked.output)["alpha-inf-seed-0"] == before["alpha-inf-seed-0"]

    def test_exits_2_where_a_run_does(self, faked, monkeypatch):
        monkeypatch.setenv("BEHAVIOUR_alpha-inf-seed-0", "2")
        assert faked(*GRID)[0] == 2

    def test_does_not_take_a_run_for_finished_that_left_no_results(self, faked, monkeypatch):
        monkeypatch.setenv("BEHAVIOUR_alpha-inf-seed-0", "0")
        code, _, error = faked(*GRID)
        assert code == 1
        assert "the run alpha = inf, seed = 0 ended without results" in error

    def test_reports_only_what_is_finished(self, faked, monkeypatch, run_in_process):
        monkeypatch.setenv("BEHAVIOUR_alpha-0.001-seed-1", "3")
        faked(*GRID)
        before = written(faked.output)
        code, printed, _ = run_in_process(sweep.main, "--output_dir", faked.output, "--report_only")
        assert code == 0
        assert "Not finished: alpha = 0.001, seed = 1." in printed
        assert written(faked.output) == before
        assert len(json.loads((faked.output / "sweep_results.json").read_text())["runs"]) == 3

    def test_reports_no_folder_that_is_none_of_a_sweep(self, run_in_process, tmp_path):
        code, _, error = run_in_process(sweep.main, "--output_dir", tmp_path, "--report_only")
        assert code == 2
        assert "has no sweep.json" in error


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (("--alpha", "0"), "use --alphas"),
            (("--alpha=0",), "use --alphas"),
            (("--max_steps", "4", "--seed", "1"), "use --seeds"),
            (("--resume-from-checkpoint", "x"), "--resume_from_checkpoint is the sweep's to set"),
            (("stray",), "stray: expected a flag"),
        ],
    )
    def test_of_flags_that_are_the_sweeps(self, faked, flags, said):
        code, _, error = faked(*flags)
        assert code == 2
        assert said in error
        assert not faked.output.exists()

    @pytest.mark.parametrize(
        "flags",
        [("--alphas", "-1"), ("--alphas", "nan"), ("--alphas", "much"), ("--seeds", "-1"), ("--nproc_per_node", "0")],
    )
    def test_of_values_that_mean_nothing(self, faked, flags):
        code, _, error = faked(*flags)
        assert code == 2
        assert flags[0] in error
        assert not faked.output.exists()

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (("--max_steps", "8"), "--max_steps was 4, now 8"),
            ((), "--max_steps was 4, now not given"),
            (("--max_steps", "4", "--bf16"), "--bf16 was not given, now given without a value"),
            (("--max_steps", "4", "--nproc_per_node", "2"), "--nproc_per_node was 1, now 2"),
        ],
    )
    def test_of_other_flags_say_what_differs(self, faked, flags, said):
        faked(*GRID, "--max_steps", "4")
        before = (faked.output / "sweep.json").read_bytes()
        code, _, error = faked(*GRID, *flags)
        assert code == 2
        assert said in error
        assert (faked.output / "sweep.json").read_bytes() == before

    def test_of_other_shards_say_so(self, faked, write_shards):
        faked(*GRID)
        code, _, error = faked(*GRID, shards=write_shards([4]))
        assert code == 2
        assert "the content of --shards was" in error

    def test_of_other_validation_shards_say_so(self, faked, write_shards):
        faked(*GRID)
        code, _, error = faked(*GRID, "--validation_shards", write_shards([2]))
        assert code == 2
        assert "the content of --validation_shards was" in error

    def test_of_shards_that_are_not_complete(self, faked, tmp_path):
        code, _, error = faked(*GRID, shards=tmp_path / "nowhere")
        assert code == 2
        assert "there is no folder" in error
        assert not faked.output.exists()

    def test_of_runs_whose_record_is_gone(self, faked):
        faked(*GRID)
        (faked.output / "sweep.json").unlink()
        code, _, error = faked(*GRID)
        assert code == 2
        assert "holds runs but no sweep.json" in error

    def test_do_not_mind_order_spelling_or_another_place_of_the_same_shards(self, faked, write_shards):
        faked(*GRID, "--max_steps", "4", "--learning_rate", "1e-3")
        code, printed, _ = faked(*GRID, "--learning-rate=1e-3", "--max_steps=4", shards=write_shards([3]))
        assert code == 0
        assert printed.count("done before") == 4

    def test_do_not_bind_before_a_run_left_anything(self, tmp_path):
        """A flag with which no run can begin has to be put right in the same folder."""
        wrong, right = {"--max_steps": "0"}, {"--max_steps": "4"}
        (tmp_path / "sweep.json").write_text(json.dumps(new_record(tmp_path, [0.0], [0], wrong)))
        assert new_record(tmp_path, [0.0], [0], wrong) is None
        assert new_record(tmp_path, [0.0], [0], right)["configuration"] == right
        checkpoint = tmp_path / "alpha-0-seed-0" / "checkpoint-3"
        checkpoint.mkdir(parents=True)
        assert new_record(tmp_path, [0.0], [0], right)["configuration"] == right
        (checkpoint / "complete.json").write_text("{}")
        with pytest.raises(ConfigurationError, match="--max_steps was 0, now 4"):
            new_record(tmp_path, [0.0], [0], right)


class TestPassedFlags:
    def test_reach_every_run(self, tmp_path):
        wanted = Sweep(tmp_path, (math.inf,), (7,), ("a", "b"), ("c",), ("--max_steps", "4"), processes=1)
        assert wanted.command(Cell(math.inf, 7)) == [
            *("-m", "trainer.pretrain", "--shards", "a", "b", "--validation_shards", "c", "--alpha", "inf"),
            *("--seed", "7", "--output_dir", str(tmp_path / "alpha-inf-seed-7"), "--max_steps", "4"),
        ]

    def test_reach_several_processes_through_torchs_launcher(self, tmp_path):
        wanted = Sweep(tmp_path, (0.0,), (0,), ("a",), (), (), processes=8)
        command = wanted.command(Cell(0.0, 0))
        assert command[:2] == ["-m", "torch.distributed.run"]
        assert command[command.index("--nproc_per_node") :][:4] == ["--nproc_per_node", "8", "-m", "trainer.pretrain"]

    def test_are_known_by_name(self):
        passed = [
            "--use_cpu",
            "--report-to=none",
            "--optim_args",
            "a=1",
            "b=2",
            "--max_steps",
            "-1",
            "--max_steps",
            "3",
        ]
        assert by_name(passed) == {
            "--use_cpu": "",
            "--report_to": "none",
            "--optim_args": "a=1 b=2",
            "--max_steps": "3",
        }

    @pytest.mark.parametrize(
        "wrong", [("--learning_rte", "1"), ("--global_batch_size", "0"), ("--lr_scheduler_type", "x")]
    )
    def test_that_pretrain_refuses_are_found_before_the_first_run(self, tmp_path, wrong):
        wanted = Sweep(tmp_path, (0.0,), (0,), ("a",), (), ("--use_cpu", *wrong), processes=1)
        with pytest.raises((ConfigurationError, SystemExit)) as error:
            parse_flags(wanted.flags(Cell(0.0, 0)))
        assert getattr(error.value, "code", 2) == 2
        assert not list(tmp_path.iterdir())

    def test_of_several_processes_are_found_by_name_and_type(self, tmp_path):
        """Their backend cannot be set up by the sweep, which is one process."""
        wanted = Sweep(tmp_path, (0.0,), (0,), ("a",), (), ("--use_cpu", "--ddp_backend", "gloo"), processes=2)
        flags = wanted.flags(Cell(0.0, 0))
        parse_flags(flags, processes=2)
        for wrong in (("--learning_rte", "1"), ("--max_steps", "many")):
            with pytest.raises(SystemExit) as error:
                parse_flags([*flags, *wrong], processes=2)
            assert error.value.code == 2


class TestProgress:
    def test_is_what_the_trainer_logged_last(self):
        text = """
{'loss': '10.83', 'grad_norm': '1.252', 'learning_rate': '0', 'epoch': '1.5', 'progress': '0.25'}
{'loss': '9.75', 'grad_norm': '1.356', 'learning_rate': '1e-06', 'epoch': '3', 'progress': '0.5'}
{'eval_uniform_loss': '8.1', 'epoch': '0.5'}
{'train_runtime': '14.45', 'train_loss': '10.83', 'epoch': '1'}
"""
        assert last_logged(text) == (0.5, "9.75")

    def test_takes_bare_numbers(self):
        assert last_logged("{'loss': 9.75, 'epoch': 3, 'progress': 0.125}") == (0.125, "9.75")

    def test_is_nothing_before_anything_is_logged(self):
        assert last_logged("starting") == (0.0, None)

    def test_can_be_drawn_on_a_terminal(self, tmp_path):
        (tmp_path / "log.txt").write_text("{'loss': 9.75, 'epoch': 3, 'progress': 0.125}\n")
        with (tmp_path / "console").open("w") as stream:
            console = Console(file=stream, force_terminal=True, width=80)
            process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.6)"])
            sweep._watch(process, tmp_path / "log.txt", 0, console)
        assert process.returncode == 0
        assert "loss 9.75" in (tmp_path / "console").read_text()


# Signals --------------------------------------------------------------------------------------------------------------

SWEEP_OF_FAKES = f"""
import os
from scorer.console import run_command
from trainer import sweep
FAKE_RUN = {FAKE_RUN!r}
def command(self, cell):
    folder = self.output / cell.name
    behaviour = ["sleep"] if cell.alpha == 0.001 and "SLEEPLESS" not in os.environ else []
    return ["-c", FAKE_RUN, str(folder), str(cell.alpha), str(cell.seed), *behaviour]
sweep.Sweep.command = command
sweep._check_flags = lambda _: None
run_command(sweep.main)
"""


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@pytest.fixture
def started(write_shards, tmp_path):
    """A sweep in its second run, which sleeps: (the sweep, how to start it again, the run's process)."""
    output = tmp_path / "sweep"
    command = [sys.executable, "-c", SWEEP_OF_FAKES, "--shards", str(write_shards([3])), "--output_dir", str(output)]
    command += ["--alphas", "inf", "0.001", "--seeds", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = output / "alpha-0.001-seed-0" / "pid"
    child = psutil.Process(int(wait_for(lambda: pid.exists() and pid.read_text())))

    def again():
        environment = {**os.environ, "SLEEPLESS": "1"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    yield process, again, child
    process.kill()
    process.communicate()
    with suppress(psutil.NoSuchProcess):
        child.kill()


@pytest.mark.parametrize(("signal_", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_too_and_the_same_command_goes_on(started, signal_, code):
    process, again, child = started
    process.send_signal(signal_)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert "run the same command again" in error
    assert "Traceback" not in error
    assert not child.is_running()
    finished = again()
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("done before") == 1


def test_a_run_that_outlives_a_killed_sweep_keeps_its_folder(started):
    process, again, child = started
    process.kill()
    process.communicate()
    refused = again()
    assert refused.returncode == 2
    assert "another sweep is at work in" in refused.stderr
    child.kill()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert again().returncode == 0


# Real runs ------------------------------------------------------------------------------------------------------------


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def flags(hardness_folder, tiny_roberta, quick):
    """240 steps of 4 blocks, some seconds, at a learning rate of 0: what is saved is what the run began with."""
    steps = ("--max_steps", "240", "--save_steps", "10", "--logging_steps", "1", "--learning_rate", "0")
    return ["--shards", str(hardness_folder), "--seeds", "0", *tiny_roberta, *steps, *quick]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, hardness_folder, flags, run_module):
    """A sweep that was ended in its second run, and then run again with one more alpha."""
    output = tmp_path_factory.mktemp("sweep") / "sweep"
    before = contents(hardness_folder)
    arguments = [*flags, "--output_dir", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.sweep", *arguments, "--alphas", "inf", "0.001"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    second = output / "alpha-0.001-seed-0"
    wait_for(lambda: next(second.glob("checkpoint-*/complete.json"), None) or process.poll(), seconds=300)
    children = psutil.Process(process.pid).children(recursive=True)
    children = [child for child in children if "trainer.pretrain" in child.cmdline()]
    process.terminate()
    _, error = process.communicate(timeout=120)
    ended = {
        "code": process.returncode,
        "error": error,
        "runs": [child.is_running() for child in children],
        "results": written(output),
        "finished": sorted(path.parent.name for path in output.glob("*/eval_results.json")),
        "steps": max(int(path.parent.name.rpartition("-")[2]) for path in second.glob("checkpoint-*/complete.json")),
    }
    again = run_module("trainer.sweep", *arguments, "--alphas", "inf", "0.001", "0", COLUMNS="200")
    return {"output": output, "ended": ended, "again": again, "shards": (before, contents(hardness_folder))}


def logs(output, alpha):
    """What each attempt at a run logged."""
    text = (output / f"alpha-{alpha}-seed-0" / "log.txt").read_text()
    return text.split("$ python -m trainer.pretrain")[1:]


@pytest.mark.slow  # a minute for all: four runs, which import torch
class TestRealSweep:
    def test_that_is_terminated_ends_its_run(self, swept):
        ended = swept["ended"]
        assert ended["code"] == 143, ended["error"]
        assert ended["runs"] == [False]
        assert ended["finished"] == ["alpha-inf-seed-0"]

    def test_goes_on_and_trains_nothing_twice(self, swept):
        assert swept["again"].returncode == 0, swept["again"].stdout + swept["again"].stderr
        name = "alpha-inf-seed-0"
        assert written(swept["output"])[name] == swept["ended"]["results"][name]
        assert [len(logs(swept["output"], alpha)) for alpha in ("inf", "0.001", "0")] == [1, 2, 1]
        share, _ = last_logged(logs(swept["output"], "0.001")[1].partition("}")[0] + "}")
        assert share == pytest.approx((swept["ended"]["steps"] + 1) / 240, abs=1e-3)

    def test_takes_one_more_alpha(self, swept):
        results = read_results(swept["output"])
        assert [summary.alpha for summary in results.summaries] == [math.inf, 0.001, 0.0]
        assert results.missing == ()

    def test_begins_every_alpha_with_the_same_weights(self, swept):
        weights = {path.read_bytes() for path in swept["output"].glob("*/model.safetensors")}
        assert len(list(swept["output"].glob("*/model.safetensors"))) == 3
        assert len(weights) == 1

    def test_evaluates_every_alpha_on_the_same_uniform_mask(self, swept):
        results = read_results(swept["output"])
        assert len({run_.metrics["eval_uniform_loss"] for run_ in results.runs}) == 1
        assert len({run_.metrics["eval_own_loss"] for run_ in results.runs}) == 3
        assert [summary.difference and summary.difference.mean for summary in results.summaries] == [None, 0.0, 0.0]

    def test_reads_the_shards_and_no_more(self, swept):
        before, after = swept["shards"]
        assert before == after
        assert any(name.endswith(".parquet") for name in before)

    def test_shows_and_writes_what_it_found(self, swept):
        printed = swept["again"].stdout
        assert "minus alpha = inf" in printed
        assert (swept["output"] / "sweep.png").read_bytes().startswith(b"\x89PNG")
        value = json.loads((swept["output"] / "sweep_results.json").read_text())
        assert [run_["alpha"] for run_ in value["runs"]] == ["inf", 0.001, 0]

    def test_finds_a_wrong_flag_before_the_first_run(self, flags, tmp_path, run_module):
        found = run_module("trainer.sweep", *flags, "--output_dir", tmp_path, "--learning_rte", "1")
        assert found.returncode == 2
        assert "--learning_rte" in found.stderr
        assert "Traceback" not in found.stderr
        assert list(tmp_path.iterdir()) == []
