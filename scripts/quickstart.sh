#!/usr/bin/env bash
# From nothing to recommendations on synthetic data: install, write data, train, export, show.
# Running it again skips what is done.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
use_venv requirements.txt
exec 8>>.venv/quickstart.lock
if command -v flock >/dev/null && ! flock -n 8; then
  echo "another quickstart is running here; waiting for its end"
  flock 8
fi

data=data/synthetic output=outputs/synthetic logs=logs/synthetic
# The manifest lists the files when all are written.
grep -q '"files"' "$data/manifest.json" 2>/dev/null || python scripts/prepare_synthetic.py "$data"
python main.py --data_dir "$data" --output_dir "$output" --log_dir "$logs" \
  --num_epochs 30 --lr 0.003 --dropout_rate 0.3
python main.py --inference_only --state_dict_path "$output/model_best.pt" \
  --data_dir "$data" --output_dir "$output"
echo
python scripts/recommend.py --data_dir "$data" --output_dir "$output" --user 10000
cat <<END

Done. What there is now:
  $data                      the data, in the format of docs/data_format.md
  $output/model_best.pt      the best epoch; metrics.json beside it has its test metrics
  $output/item_embeddings/   embedding.fbin and id.u64bin for a vector index
  $output/user_embeddings/   the test users' queries and their top-10 items
Where to look next:
  source .venv/bin/activate                          makes python and tensorboard those of .venv
  tensorboard --logdir $logs               the curves
  README.md, "See what it recommends"                items near another, your own events
  README.md, "Your own data"                         MovieLens-1M and your own events
END
