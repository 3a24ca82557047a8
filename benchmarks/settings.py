"""The named settings of reproduce.py: the data of each, and the flags of main.py."""

from __future__ import annotations

# Data set -> script that writes it, and the script's arguments.
DATA = {
    "synthetic": "prepare_synthetic.py {data}",
    "ml-1m": "prepare_movielens.py {source} {data}",
    "beauty": "prepare_table.py {source}/interactions.csv.gz {data} --order seq_pos "
    "--item_features {source}/items.csv.gz --item_names text --array text --drop n",
    "kuairand": "prepare_table.py {source}/interactions.csv.gz {data} --time time_ms "
    "--action is_follow is_like long_view is_click --item_features {source}/items.csv.gz "
    "--user_features {source}/users.csv.gz --sparse author_id --continual video_duration "
    "--drop counts play_* *_cnt *_num comment_stay_duration",
    "retailrocket": "prepare_table.py {source}/interactions.csv.gz {data} --action action",
}
IDS_AND_TIMES = "--item_features none --user_features none --no-actions --mm_emb_id"
IDS = f"{IDS_AND_TIMES} --time_bias=off"
SMALL = (
    "--maxlen=200 --num_blocks=2 --num_heads=1 --hidden_units=50 --attention_dim=50 --linear_dim=50"
)
LARGE = (
    "--maxlen=200 --num_blocks=8 --num_heads=2 --hidden_units=50 --attention_dim=25 --linear_dim=25"
)
ML_1M_SMALL = "--infonce_temp=0.04 --lr=0.0072 --dropout_rate=0.1 --num_epochs=16"
ML_1M_LARGE = "--infonce_temp=0.04 --lr=0.005 --dropout_rate=0.15 --num_epochs=14"
BEAUTY = (
    "--maxlen=20 --hidden_units=128 --attention_dim=128 --linear_dim=128 --batch_size=1024 "
    "--lr=0.008 --dropout_rate=0.5 --infonce_temp=0.08 --num_epochs=14 --no-muon"
)
KUAIRAND = (
    "--maxlen=50 --batch_size=512 --lr=0.006 --dropout_rate=0.4 --infonce_temp=0.06 "
    "--num_epochs=10 --no-muon"
)
# Name -> (data set, flags of main.py).
SETTINGS = {
    # As scripts/quickstart.sh.
    "quickstart": ("synthetic", "--num_epochs=30 --lr=0.003 --dropout_rate=0.3"),
    "ml-1m-small": ("ml-1m", f"{IDS_AND_TIMES} {SMALL} {ML_1M_SMALL}"),
    "ml-1m-four-heads": (
        "ml-1m",
        f"{IDS_AND_TIMES} {SMALL} --num_heads=4 {ML_1M_SMALL} --num_epochs=12",
    ),
    "ml-1m-large": ("ml-1m", f"{IDS_AND_TIMES} {LARGE} {ML_1M_LARGE}"),
    "ml-1m-large-four-heads": ("ml-1m", f"{IDS_AND_TIMES} {LARGE} --num_heads=4 {ML_1M_LARGE}"),
    "beauty-ids": ("beauty", f"{IDS} {BEAUTY}"),
    "beauty-ids-mix": ("beauty", f"{IDS} {BEAUTY} --mix_previous=8"),
    "beauty-request-mix": (
        "beauty",
        f"{IDS_AND_TIMES} {BEAUTY} --mix_previous=8 --num_heads=2 --time_head",
    ),
    "beauty-event": ("beauty", f"{IDS_AND_TIMES} --time_bias=event {BEAUTY}"),
    "beauty-request": ("beauty", f"{IDS_AND_TIMES} {BEAUTY}"),
    "beauty-features": ("beauty", f"--mm_emb_id --time_bias=off {BEAUTY} --id_dropout=0.2"),
    "beauty-features-whole": ("beauty", f"--mm_emb_id --time_bias=off {BEAUTY}"),
    "beauty-features-mix": (
        "beauty",
        f"--mm_emb_id --time_bias=off {BEAUTY} --id_dropout=0.2 --mix_previous=8",
    ),
    "beauty-features-request-mix": (
        "beauty",
        f"--mm_emb_id {BEAUTY} --id_dropout=0.2 --mix_previous=8 --num_heads=2 --time_head",
    ),
    "kuairand-ids": ("kuairand", f"{IDS} {KUAIRAND}"),
    "kuairand-actions": (
        "kuairand",
        f"--item_features none --user_features none --mm_emb_id --time_bias=off {KUAIRAND}",
    ),
    "kuairand-items": ("kuairand", f"--user_features none --time_bias=off {KUAIRAND}"),
    "kuairand-users": ("kuairand", f"--time_bias=off {KUAIRAND}"),
    "kuairand-time": ("kuairand", KUAIRAND),
    "kuairand-target-action": ("kuairand", f"{KUAIRAND} --target_action"),
    "kuairand-target-action-mix": ("kuairand", f"{KUAIRAND} --target_action --mix_previous=8"),
    "retailrocket-default": ("retailrocket", "--num_epochs=12"),
    "retailrocket-no-residual": (
        "retailrocket",
        "--num_epochs=12 --min_updates=0 --history_residual=off",
    ),
    "retailrocket-wide": (
        "retailrocket",
        "--num_epochs=12 --min_updates=0 --hidden_units=128 --attention_dim=128 --linear_dim=128",
    ),
}
# The defaults, and the same inputs and shape with other flags of optimisation; MovieLens' are what
# scripts/tune.py found (tune_ml-1m.json).
SETTINGS |= {
    "ml-1m-default": ("ml-1m", "--num_epochs=12"),
    "ml-1m-default-uncut": ("ml-1m", "--num_epochs=12 --min_updates=0"),
    "ml-1m-default-tuned": (
        "ml-1m",
        "--num_epochs=11 --lr=0.0072 --dropout_rate=0 --infonce_temp=0.04 --maxlen=200",
    ),
    "beauty-default": ("beauty", "--num_epochs=12"),
    "beauty-default-tuned": (
        "beauty",
        "--batch_size=1024 --lr=0.008 --dropout_rate=0.5 "
        "--infonce_temp=0.08 --num_epochs=14 --no-muon",
    ),
    "kuairand-default": ("kuairand", "--num_epochs=8"),
    "kuairand-default-tuned": ("kuairand", KUAIRAND.replace("--maxlen=50 ", "")),
}
# ML-1M, small shape, of each user the newest events alone, 8 epochs: one thing changed each time.
# Seed 42.
ABLATION_BASE = (
    f"{IDS_AND_TIMES} {SMALL} --infonce_temp=0.05 --no-windows --batch_size=16 --lr=0.003 "
    "--num_epochs=8"
)
ABLATIONS = {
    "base": "",
    "time-event": "--time_bias=event",
    "time-off": "--time_bias=off",
    "position-off": "--no-position_bias",
    "biases-off": "--time_bias=off --no-position_bias",
    "uniform-1024": "--negatives=uniform",
    "uniform-256": "--negatives=uniform --num_negatives=256",
    "batch": "--negatives=batch",
    "batch-no-logq": "--negatives=batch --no-logq",
    "mixed": "--negatives=mixed",
    "mixed-no-logq": "--negatives=mixed --no-logq",
    "temperature-.03": "--infonce_temp=0.03",
    "temperature-.1": "--infonce_temp=0.1",
    "windows": "--windows",
    "actions": "--actions",
    "target-action": "--target_action",
    "adamw": "--no-muon",
}
SETTINGS |= {
    f"ablation-{name}": ("ml-1m", f"{ABLATION_BASE} {flags}".rstrip())
    for name, flags in ABLATIONS.items()
}
