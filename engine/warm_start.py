"""A training that starts with the weights of another one: --init_from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.state import Run
from engine.trained_model import Table, read_model, tables
from files.atomic_io import DataError
from files.checkpoint import differences
from files.data_folder import digest_of_ids, read_manifest
from files.vocabulary import Vocabulary, load_vocabulary, read_vocabulary, write_vocabulary
from hstu_components import module_key
from model import HSTUConfig
from ops.collectives import is_main_process
from ops.sharded_table import ShardedEmbedding, own_rows

log = logging.getLogger("hstu")

VOCABULARY = "vocabulary.pkl"  # beside the models of a training: what its numbers stand for
# Settings that decide what the weights are; the others may differ from those of the earlier model.
SHAPE = (
    "maxlen", "hidden_units", "num_blocks", "num_heads", "attention_dim", "linear_dim",
    "mix_previous", "time_bias", "position_bias", "time_head", "history_residual",
)  # fmt: skip


def standardised_as(config: HSTUConfig, earlier: HSTUConfig) -> HSTUConfig:
    """The config with the mean and std of numbers of the earlier one, whose weights fit to them."""
    changes = {}
    for side in ("item_features", "user_features"):
        specs = changes[side] = dict(getattr(config, side))
        for i, spec in getattr(earlier, side).items():
            is_number = i in specs and specs[i]["kind"] == spec["kind"] == "continual"
            if is_number and is_carried(i, config, earlier):
                specs[i] = dict(spec)
    return replace(config, **changes)


def is_carried(feature_id: str, config: HSTUConfig, earlier: HSTUConfig) -> bool:
    """Whether a feature of a model has the weights of the earlier model's one.

    A column of numbers that was transformed otherwise is another feature.
    """
    specs = [c.item_features | c.user_features for c in (config, earlier)]
    if not all(feature_id in side for side in specs):
        return False
    is_number = specs[0][feature_id]["kind"] == specs[1][feature_id]["kind"] == "continual"
    return not is_number or not means_something_else(feature_id, config, earlier)


def means_something_else(feature_id: str, config: HSTUConfig, earlier: HSTUConfig) -> bool:
    """Whether it is known that the numbers of a feature stand for something else in two models."""
    digests = [(c.feature_digests or {}).get(feature_id) for c in (config, earlier)]
    return None not in digests and digests[0] != digests[1]


def begin(run: Run, init_from: str | None, data_dir: str, trust_pickle: bool) -> None:
    """Take over the weights of `init_from`, and write what the numbers of the data stand for.

    A run that goes on has its own weights, and its vocabulary but for one that was copied here.

    Raises:
        DataError: as `start_from`.
    """
    is_fresh = run.progress.step == 0
    writes = is_main_process() and (is_fresh or not (run.output_dir / VOCABULARY).exists())
    if not writes and not (is_fresh and init_from):
        return  # the ids of millions of items take a gigabyte
    manifest = read_manifest(data_dir, trust=trust_pickle)
    vocabulary = read_vocabulary(data_dir, manifest, trust=trust_pickle)
    if is_fresh and init_from:
        start_from(run, Path(init_from), vocabulary)
    used = run.model.config.item_features | run.model.config.user_features
    values = {i: v for i, v in vocabulary.feature_values.items() if i in used}
    if writes:
        kept = vocabulary._replace(feature_values=values)
        write_vocabulary(run.output_dir / VOCABULARY, kept)


@torch.no_grad()
def start_from(run: Run, path: Path, vocabulary: Vocabulary) -> None:
    """Give a fresh run the weights of a trained model; `vocabulary`: of the run's data.

    Rows of items, action types and feature values go by original ids, names and raw values; those
    that the model does not know stay as they were drawn.

    Raises:
        DataError: the model has another shape, or what its numbers stand for is not known.
    """
    earlier, weights, _ = read_model(path)
    config = run.model.config
    refuse_other_shape(path, shape_of(earlier, config), shape_of(config, earlier))
    vocabularies = vocabulary_of(path, earlier), vocabulary
    known = {table.weight: table for table in tables(earlier)}
    counts = {}
    for table in tables(config):
        before = known.get(table.weight)
        if before is not None and table.weight in weights and table.size:
            values = [values_of(v, t) for v, t in zip(vocabularies, (before, table), strict=True)]
            if None in values:
                values = [range(1, t.size + 1) for t in (before, table)]  # by number
                if table.feature_id and means_something_else(table.feature_id, config, earlier):
                    values[0] = []
            rows = earlier_rows(*values)
            copy_rows(run, table.weight, weights[table.weight], rows)
            counts[table.what] = (rows > 0).sum(), table.size, before.size
    copy_others(run, path, weights, earlier)
    parts = [
        f"{what} {kept:,} known, {now - kept:,} new, {before - kept:,} gone"
        for what, (kept, now, before) in counts.items()
    ]
    features, others = (c.item_features | c.user_features for c in (config, earlier))
    parts += [f"feature {i} new" for i in features if not is_carried(i, config, earlier)]
    parts += [f"feature {i} gone" for i in others if i not in features]
    for name, words in (
        ("num_action_types", "actions"),
        ("num_target_action_types", "next action"),
    ):
        is_input, was_input = getattr(config, name) > 0, getattr(earlier, name) > 0
        if is_input != was_input:
            parts.append(f"input of the {words} {'new' if is_input else 'gone'}")
    log.info("start from %s: %s", path, "; ".join(parts))


def shape_of(config: HSTUConfig, other: HSTUConfig) -> dict[str, Any]:
    """What has to be the same in two models, of which one gets the weights of the other."""
    features, others = (c.item_features | c.user_features for c in (config, other))
    kinds = {i: features[i]["kind"] for i in features if i in others}
    widths = {i: features[i]["size"] for i, kind in kinds.items() if kind == "emb"}
    return {name: getattr(config, name) for name in SHAPE} | {"kind": kinds, "width": widths}


def refuse_other_shape(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    if changed := "; ".join(differences(saved, current)):
        raise DataError(
            f"{path}: --init_from needs a model of the same shape, but {changed}; use the flags of "
            "its training, or train without --init_from"
        )


def vocabulary_of(path: Path, config: HSTUConfig) -> Vocabulary:
    """What the numbers of the model's training stand for."""
    source = path.parent / VOCABULARY
    if not source.exists():
        raise DataError(
            f"{source}: missing, but --init_from needs what the numbers of the model stand for; "
            "name a model in the folder of its training, not of an earlier version"
        )
    vocabulary = load_vocabulary(source)
    digest = config.item_ids_digest or digest_of_ids(vocabulary.item_ids)
    if len(vocabulary.item_ids) != config.num_items or digest_of_ids(vocabulary.item_ids) != digest:
        raise DataError(
            f"{source}: has not the items of {path.name}; it is of another training, name a model "
            "in the folder of its training"
        )
    return vocabulary


def values_of(vocabulary: Vocabulary, table: Table) -> Sequence[Any] | None:
    """What rows 1, 2, ... of a table stand for; None: not known."""
    if table.what == "items":
        return vocabulary.item_ids
    if table.what == "action types":
        return vocabulary.action_names
    values = vocabulary.feature_values.get(table.feature_id)
    return values if values is not None and len(values) == table.size else None


def earlier_rows(before: Sequence[Any], now: Sequence[Any]) -> np.ndarray:
    """(n + 1,) int64 of each row of a table its row in the earlier one; -1: it has none.

    By the texts of the values, as an id may be 5 in one folder and "5" in another.
    """
    row_of = {str(value): row for row, value in enumerate(before, 1)}
    return np.array([0, *(row_of.get(str(value), -1) for value in now)])


def copy_rows(run: Run, name: str, source: Tensor, rows: np.ndarray) -> None:
    module = run.model.get_submodule(name.removesuffix(".weight"))
    rows = torch.from_numpy(rows)
    if isinstance(module, ShardedEmbedding):
        rows = own_rows(rows)
    is_known = rows >= 0
    module.weight[is_known.to(run.device)] = source[rows[is_known]].to(module.weight)


def copy_others(run: Run, path: Path, weights: Mapping[str, Tensor], earlier: HSTUConfig) -> None:
    """Copy all weights that are no tables; features that one of the two lacks are left as drawn."""
    config = run.model.config
    apart = {table.weight for c in (config, earlier) for table in tables(c)}
    features = config.item_features | config.user_features | earlier.item_features
    of_others = tuple(
        f"emb_transform.{module_key(i)}."
        for i in features | earlier.user_features
        if not is_carried(i, config, earlier)
    )
    state = dict(run.model.named_parameters())
    state |= {name: buffer for name, buffer in run.model.named_buffers() if name in weights}
    # Whether all items have a vector is a matter of the data, and so is what stands for none.
    saved, current = (
        {
            name: tensor
            for name, tensor in named.items()
            if name not in apart
            and not name.startswith(of_others)
            and ("stand_in" not in name or name in weights.keys() & state.keys())
        }
        for named in (weights, state)
    )
    shapes = [{name: tuple(w.shape) for name, w in named.items()} for named in (saved, current)]
    refuse_other_shape(path, *shapes)
    for name, tensor in saved.items():
        current[name].copy_(tensor)
