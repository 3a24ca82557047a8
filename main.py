"""Train HSTU, test or export a trained model: flags in, then the training loop from top to bottom.

A model of your own: `sys.exit(main(model_class=MyModel))`. A metric of your own is one more entry
in METRICS, a feature type one in dataset.PARSERS and one in hstu_components.ENCODERS.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from engine.evaluation import evaluate
from engine.export import infer
from engine.flags import FREE_FLAGS, get_args
from engine.metrics import METRICS  # noqa: F401
from engine.report import evaluate_checkpoint, project_items, report, test_best
from engine.run_log import RunLog, progress_bar
from engine.setup import make_loader, set_up_process
from engine.signals import Stopped, stop_signal
from engine.state import Run, resume, save_epoch, save_run
from engine.training_setup import announce, eval_loader, prepare_run
from engine.training_step import IF_NOT_FINITE
from engine.warm_start import begin
from files.atomic_io import DataError, cause, lock_folder, sweep_temporaries
from model import HSTUModel
from ops.collectives import LostProcessError, is_first_to_fail, is_main_process, leave, world_size

log = logging.getLogger("hstu")


def main(argv: list[str] | None = None, model_class: type[HSTUModel] = HSTUModel) -> int:
    """Train, evaluate or export as the command line says; the exit code.

    Of several processes, the first one to fail says why; the main process says everything else.
    """
    exit_code = 0
    # tqdm would make one when it first prints, where a signal may come; Python 3.14's is a process.
    tqdm.set_lock(threading.RLock())
    try:
        with stop_signal, log_to_stdout():
            args = get_args(argv)
            set_up_process(args)
            if args.inference_only:
                infer(args, model_class)
            elif args.evaluate:
                evaluate_checkpoint(args, model_class)
            else:
                train(args, model_class)
    except Stopped as stop:
        if is_main_process():
            print(stop)
        exit_code = stop.exit_code
    except (DataError, OSError, LostProcessError, MemoryError, RuntimeError) as error:
        line = one_line(error)
        if args.debug or not line:
            raise
        if is_first_to_fail():
            print(f"error: {line}", file=sys.stderr)
        if world_size() > 1:  # at a normal end, gloo may abort a process whose peer is gone
            sys.stderr.flush()
            os._exit(1)
        return 1
    leave()
    return exit_code


@contextmanager
def log_to_stdout() -> Iterator[None]:
    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = self.format(record).encode(errors="replace").decode()  # paths may be no text
            tqdm.write(text)  # above a progress bar
            sys.stdout.flush()

    handler = Lines()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


def one_line(error: Exception) -> str:
    """What a user can act on, without its traceback; empty for a fault of the program."""
    text = str(error)
    if text.startswith("Caught "):  # in a loader process, whose traceback comes before the message
        text = text.rstrip().rpartition("Error: ")[2]
    if isinstance(error, DataError | LostProcessError | OSError):
        return cause(error) if getattr(error, "filename", None) else text
    is_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if is_of_memory or "allocate memory" in text or "Unable to allocate" in text:  # numpy's
        first = (text or "MemoryError").splitlines()[0]
        return f"out of memory, lower --batch_size or the model's widths ({first:.150})"
    if text.startswith("DataLoader worker"):
        return f"a loader process was killed, out of memory? lower --num_workers ({text:.150})"
    return ""


def train(args: argparse.Namespace, model_class: type[HSTUModel]) -> None:
    """Train, validate after each epoch, test the best epoch once; everything ends in output_dir."""
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with lock_folder(output_dir) if is_main_process() else nullcontext():
        if is_main_process():
            sweep_temporaries(output_dir)
        run = prepare_run(args, model_class)
        with stop_signal.deferred():
            resume(run, args.resume, args.overwrite, vars(args))
            begin(run, args.init_from, args.data_dir, args.trust_pickle)
            if not run.progress.is_finished:
                announce(args, run)
                if is_main_process():
                    (output_dir / "metrics.json").unlink(missing_ok=True)  # an earlier run's
            if not run.progress.is_finished or args.projector:
                first_step = run.progress.step + 1
                total_steps = run.training_step.options.total_steps
                with RunLog(
                    args.log_dir, first_step, total_steps, args.num_epochs, args.log_every
                ) as run_log:
                    if run.progress.step == 0:
                        run_log.start(vars(args), vars(args).keys() - FREE_FLAGS)
                    train_epochs(args, run, run_log)
                    if args.projector:
                        project_items(run, args.data_dir, args.trust_pickle, run_log)
            test_best(run, eval_loader(args, run, "test"), args.precision)
        if is_main_process():
            is_early = run.progress.epoch < args.num_epochs
            reason = f", stopped by --patience {args.patience}" * is_early
            report(run, args.data_dir, args.log_dir, reason)


def train_epochs(args: argparse.Namespace, run: Run, run_log: RunLog) -> None:
    """The epochs that are left, each followed by validation and checkpoints.

    Raises:
        DataError: the data changed, or loss or gradient are not finite.
        Stopped: by a signal; a state of the last step is saved.
    """
    progress, train_set = run.progress, run.datasets["train"]
    train_loader = make_loader(
        train_set, run.batch_size, args.seed, run.device, args.num_workers, is_shuffled=True
    )
    valid_loader = eval_loader(args, run, "valid")
    while not progress.is_finished:
        for dataset in run.datasets.values():
            dataset.sequences.check_unchanged()
        started, metrics = time.perf_counter(), {}
        try:
            train_one_epoch(args, run, train_loader, run_log)
            seconds = time.perf_counter() - started
            if valid_loader is not None:
                ranking = evaluate(run.model, valid_loader, precision=args.precision)
                metrics = ranking.metrics()
        except Stopped as stop:
            run_log.flush()
            save_run(run)  # after the epoch's last batch too: it goes on with the validation
            raise Stopped(stop.number, where_to_go_on(args, run)) from None
        if not math.isfinite(metrics.get("loss", 0.0)):
            found = f"epoch {progress.epoch + 1}: validation loss {metrics['loss']}"
            raise DataError(f"{found}; its model was not saved. {IF_NOT_FINITE}")
        train_loss = progress.loss_sum / max(1, progress.loss_steps)
        progress.end_epoch(metrics, args.early_stop_on, args.num_epochs, args.patience)
        if metrics:
            run_log.similarities(progress.step, ranking.target_cosines, ranking.other_cosines)
        run_log.epoch(progress, train_loss, metrics, seconds)
        save_epoch(run)


def train_one_epoch(
    args: argparse.Namespace, run: Run, loader: DataLoader, run_log: RunLog
) -> None:
    """The training steps that are left of the epoch under way.

    Raises:
        DataError: loss or gradient are not finite.
        Stopped: by a signal, after a step.
    """
    progress, epoch, sampler = run.progress, run.progress.epoch + 1, loader.batch_sampler
    sampler.epoch, sampler.first_batch = progress.epoch, progress.batch
    name, total = f"epoch {epoch}/{args.num_epochs}", sampler.num_batches
    bar = progress_bar(desc=name, total=total, initial=progress.batch)
    loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=run.device)
    run.model.train()
    run_log.start_interval()
    batches, asked = [], time.perf_counter()
    try:
        for batch in loader:
            run_log.wait_seconds += time.perf_counter() - asked
            batches.append(batch)
            is_last = progress.batch + len(batches) == sampler.num_batches
            if len(batches) == args.accumulate_steps or is_last:
                values = run.training_step(batches, epoch, progress.step + 1)
                loss_sum += values["Loss/train"]
                progress.batch += len(batches)
                progress.step += 1
                progress.loss_steps += 1
                run_log.step(epoch, progress.step, batches, values, bar)
                bar.update(len(batches))
                batches = []
                is_due = args.save_every_steps and progress.step % args.save_every_steps == 0
                if is_due and not is_last:  # else save_epoch does, after the epoch's curves
                    run.training_step.check_finite(epoch, progress.step)
                    progress.loss_sum = loss_sum.item()
                    run_log.flush()  # a resumed run logs what comes after the state
                    save_run(run)
                stop_signal.check()
            asked = time.perf_counter()
    finally:
        bar.close()
        progress.loss_sum = loss_sum.item()
    run.training_step.check_finite(epoch, progress.step)


def where_to_go_on(args: argparse.Namespace, run: Run) -> str:
    how = "" if args.resume == "auto" else " with --resume auto"
    how += ", without --overwrite," if args.overwrite else ""
    place = f"epoch {run.progress.epoch + 1}, step {run.progress.step}"
    return f" at {place}; the same command{how} goes on from there"


if __name__ == "__main__":
    sys.exit(main())
