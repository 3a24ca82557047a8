"""Find settings for a log that nobody has tuned: trainings by main.py, of which bad ones end early.

    python scripts/tune.py --data_dir data/mine --output_dir outputs/tune --hours 2

The same command goes on with a tune that was stopped. Needs Optuna (`pip install -r
requirements-tune.txt`).
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tune_space import STARTS, params_of, search_space, settings_of

from engine.flags import between, get_args
from engine.run_log import duration
from engine.signals import Stopped, stop_signal
from files.atomic_io import DataError, atomic_write, exit_code, lock_folder, read_json
from files.data_folder import fingerprint, read_manifest
from files.sequences import open_split

with suppress(ImportError):  # said in run_tune
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState
    from tune_report import draw_trials, line_of, show_trials, words_of, write_trials

ROOT = Path(__file__).resolve().parent.parent
SEED = 1  # of the proposals; the trainings have --seed
# Trainings that the hours would suffice for if none ended early; the number of epochs follows.
WHOLE_TRAININGS = 10
EPOCHS = 3, 30  # at least, at most
# In this part of its epochs no training is pruned: large batches and dropout start slowly.
UNPRUNED_PART = 0.5
# Later a training is pruned if it is not among the best of so many percent of the whole ones.
KEPT_PERCENT = 75.0
# Flags of main.py that are the tune's own business.
OWN = {
    "data_dir", "output_dir", "log_dir", "resume", "overwrite", "inference_only", "evaluate",
    "state_dict_path",
}  # fmt: skip
EPOCH_LINE = re.compile(r"epoch (\d+)/\d+: train loss .*, NDCG@10 ([\d.]+)")
NUM_SHOWN = 5


class Tune(NamedTuple):
    """A study, and what all of its trainings share."""

    args: argparse.Namespace
    passed: list[str]  # the words after --
    flags: Mapping[str, Any]  # of main.py, with these words
    space: Mapping[str, Any]  # of `search_space`
    study: optuna.Study

    @property
    def whole(self) -> list[Any]:
        """The trials that were not pruned, the best first."""
        trials = self.study.get_trials(states=[TrialState.COMPLETE])
        return sorted(trials, key=lambda trial: -trial.value)

    @property
    def seconds_left(self) -> float:
        used = [trial.user_attrs.get("seconds", 0) for trial in self.study.trials]
        return 3600 * self.args.hours - self.study.user_attrs["seconds"] - sum(used)


def main(argv: list[str] | None = None) -> int:
    args, passed = split_args(sys.argv[1:] if argv is None else argv)
    try:
        with stop_signal:
            return exit_code(lambda: run_tune(args, passed))
    except Stopped as stop:
        print(f"{stop}; the same command goes on from there")
        return stop.exit_code


def split_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this script, and the words after `--`, which are for main.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Flags after -- go to every training, and are not searched: -- --num_blocks 8",
    )  # fmt: skip
    flag = parser.add_argument
    flag("--data_dir", default="./data", help="folder of train_data.bin and the rest")
    text = "a folder per trial, the table and the picture"
    flag("--output_dir", type=Path, default="./outputs/tune", help=text)
    text = "for all trials, those before a stop too; more of them go on with a finished tune"
    flag("--hours", type=between(0, math.inf), default=2.0, help=text)
    end = argv.index("--") if "--" in argv else len(argv)
    args, passed = parser.parse_args(argv[:end]), argv[end + 1 :]
    if wrong := named(passed) - (vars(get_args([])).keys() - OWN):
        parser.error(f"--{min(wrong)} after --: no flag of a training, or not spelt out")
    return args, passed


def named(words: Sequence[str]) -> set[str]:
    """Names of the flags among the words of a command."""
    flags = (word[2:].partition("=")[0] for word in words if word.startswith("--"))
    return {name.removeprefix("no-") for name in flags}


def run_tune(args: argparse.Namespace, passed: list[str]) -> None:
    """Run trials until the time is over; print and write what they found.

    Raises:
        DataError: a package is missing, the data cannot be validated on, the folder is that of
            another tune, or the training with the defaults fails.
    """
    if "draw_trials" not in globals():
        raise DataError("no Optuna or matplotlib here; pip install -r requirements-tune.txt")
    flags = vars(get_args(passed))
    manifest = read_manifest(args.data_dir, trust=flags["trust_pickle"])
    folder, has_targets = Path(args.data_dir), manifest.targets.get("valid") == "last"
    if not has_targets or not (np.diff(open_split(folder, "valid")[1]) > 1).any():
        raise DataError(f"{args.data_dir}: no valid split with known targets, which trials need")
    lengths = np.diff(open_split(folder, "train")[1])
    space = search_space(lengths, manifest.num_items, flags, named(passed))
    if not space:
        raise DataError("all flags that could be searched were given after --; leave one out")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with lock_folder(args.output_dir):
        tune = Tune(args, passed, flags, space, open_study(args, passed, flags))
        epochs = tune.study.user_attrs["num_epochs"]
        names = ", ".join(space)
        print(f"searching {names}; {epochs} epochs a trial, {args.hours:g} hours", flush=True)
        try:
            while has_time(tune) and run_trial(tune, next_trial(tune)):
                pass
        finally:
            if tune.whole:
                report(tune)


def open_study(
    args: argparse.Namespace, passed: list[str], flags: Mapping[str, Any]
) -> optuna.Study:
    """The study in the output folder, with the number of epochs that all its trials have.

    Raises:
        DataError: it is that of other data or flags, or an epoch with the defaults fails.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(args.output_dir / "trials.journal")))
    names = {"storage": storage, "study_name": "tune", "load_if_exists": True}
    study = optuna.create_study(direction="maximize", **names)
    asked = {"data": fingerprint(args.data_dir), "flags": passed}
    if study.user_attrs.get("asked", asked) != asked:
        found = "holds a tune of other data, or with other flags after --"
        raise DataError(f"{args.output_dir}: {found}; name another --output_dir")
    if "num_epochs" not in study.user_attrs:
        began, num_epochs = time.monotonic(), flags["num_epochs"]
        if "num_epochs" not in named(passed):
            print("timing an epoch with the defaults", flush=True)
            words = command_of(args, passed, {"num_epochs": 1}, "pace")
            list(epochs_of([*words, "--resume=none", "--overwrite"], args.output_dir / "pace"))
            for path in (args.output_dir / "pace").glob("*.pt"):
                path.unlink()
            seconds = WHOLE_TRAININGS * (time.monotonic() - began)
            num_epochs = int(np.clip(3600 * args.hours / seconds, *EPOCHS))
        study.set_user_attr("asked", asked)
        study.set_user_attr("seconds", time.monotonic() - began)
        study.set_user_attr("num_epochs", num_epochs)
    warmup = math.ceil(UNPRUNED_PART * study.user_attrs["num_epochs"])
    counts = {"n_startup_trials": len(STARTS), "n_warmup_steps": warmup}
    study.pruner = optuna.pruners.PercentilePruner(KEPT_PERCENT, **counts)
    return study


def command_of(
    args: argparse.Namespace, passed: list[str], settings: Mapping[str, Any], name: str
) -> list[str]:
    """The words of a training whose files are in the folder `name`."""
    folder = str(args.output_dir / name)
    words = ["python", "main.py", "--data_dir", args.data_dir]
    words += ["--output_dir", folder, "--log_dir", folder]
    return [*words, *words_of(settings), *passed]


def epochs_of(words: Sequence[str], folder: Path) -> Iterator[tuple[int, float]]:
    """Train; number and NDCG@10 of each epoch as it ends. If it is closed, the training ends.

    Raises:
        DataError: the training fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    line, command = "", [sys.executable, str(ROOT / words[1]), *words[2:]]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, errors="replace", **options)
    try:
        with open(folder / "train.log", "a", buffering=1) as log:  # by the line
            for line in process.stdout:
                log.write(line)
                if found := EPOCH_LINE.match(line):
                    yield int(found[1]), float(found[2])
        if process.wait():
            reason = line.strip().removeprefix("error: ") or f"exit code {process.returncode}"
            raise DataError(f"{log.name}: {reason}")
    finally:
        process.terminate()  # it saves its state after the training step under way
        process.communicate()


def has_time(tune: Tune) -> bool:
    """Whether a trial as fast as the fastest so far could end; the first one starts anyway."""
    fastest = min((trial.user_attrs["seconds"] for trial in tune.whole), default=-math.inf)
    return fastest <= tune.seconds_left


def next_trial(tune: Tune) -> optuna.Trial:
    """One that was stopped, or the next proposal, which follows from those before it alone."""
    study = tune.study
    if not study.trials:
        for name, start in STARTS.items():
            params = params_of(start, tune.flags, tune.space)
            study.enqueue_trial(params, user_attrs={"start": name}, skip_if_exists=True)
    stopped = study.get_trials(states=[TrialState.RUNNING])
    seed = SEED + (stopped[0].number if stopped else len(study.trials))
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)
    if not stopped:
        return study.ask(tune.space)
    trial = optuna.Trial(study, stopped[0]._trial_id)
    for name, values in tune.space.items():  # as `ask` does, which may have been interrupted
        trial._suggest(name, values)
    return trial


def run_trial(tune: Tune, trial: optuna.Trial) -> bool:
    """Train and tell the study; False: the hours do not suffice, and it may go on later."""
    name, settings = f"trial_{trial.number:03}", settings_of(trial.params, tune.flags)
    folder, num_epochs = tune.args.output_dir / name, tune.study.user_attrs["num_epochs"]
    if "num_epochs" not in named(tune.passed):
        settings["num_epochs"] = num_epochs
    reported = tune.study.trials[trial.number].intermediate_values
    before, seconds_left = trial.user_attrs.get("seconds", 0), tune.seconds_left
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):  # a training may outlive a tune that was killed: leave it the trial
        pass
    began = last = time.monotonic()
    value, end = None, ""
    try:
        words = command_of(tune.args, tune.passed, settings, name)
        with closing(epochs_of(words, folder)) as epochs:
            for epoch, ndcg in epochs:
                if epoch not in reported:  # else a kill came between its line and its state
                    trial.report(ndcg, epoch)
                pace, last = time.monotonic() - last, time.monotonic()
                to_come = pace * (num_epochs - epoch)
                if to_come and trial.should_prune():
                    end = f"pruned after epoch {epoch}"
                    break
                if trial.number and last - began + to_come > seconds_left:
                    print(f"{name} would take {duration(to_come)} more: --hours are over")
                    return False
            else:
                metrics = read_json(folder / "metrics.json")
                value, end = metrics["valid"]["NDCG@10"], f"best epoch {metrics['best_epoch']}"
    except DataError as error:
        if not trial.number:
            raise
        end = f"failed: {error}"
    finally:
        trial.set_user_attr("seconds", before + time.monotonic() - began)
    trial.set_user_attr("settings", settings)
    trial.set_user_attr("end", end)
    tune.study.tell(trial, value, state=TrialState.PRUNED if value is None else None)
    for path in folder.glob("*.pt"):
        if value is None or path.name != "model_best.pt":
            path.unlink()
    print(line_of(tune.study.trials[trial.number]), flush=True)
    return True


def report(tune: Tune) -> None:
    """Print the best trials and the best one's command; write the table and the picture."""
    folder, best = tune.args.output_dir, tune.whole[0]
    trials = tune.study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED])
    print(f"\n{len(trials)} trials, {len(tune.whole)} of them to the end; the best:")
    show_trials(tune.whole[:NUM_SHOWN], list(tune.space))
    write_trials(folder / "trials.csv", trials)
    with atomic_write(folder / "trials.png") as file:
        draw_trials(trials, list(tune.space)).savefig(file, dpi=110)
    print(f"wrote {folder}/trials.csv and trials.png; the curves: tensorboard --logdir {folder}")
    defaults = trials[0].value
    more = f", {100 * (best.value / defaults - 1):.1f} % above the defaults" if defaults else ""
    print(f"trial {best.number} has NDCG@10 {best.value:.4f} in the validation{more}; its command:")
    print(shlex.join(command_of(tune.args, tune.passed, best.user_attrs["settings"], "best")))


if __name__ == "__main__":
    sys.exit(main())
