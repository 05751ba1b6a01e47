#!/usr/bin/env bash
# From a fresh clone to a talking portrait: makes the small model, trains it a little on examples/clips, animates examples/portrait.jpg.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export HF_HUB_OFFLINE=1
python=.venv/bin/python
output=outputs/quickstart

rm -rf "$output"/checkpoint-* # of an earlier call; what it prepared is used again
[ -f checkpoints/sonic-mini/sonic.json ] || "$python" scripts/build_mini.py
"$python" sonic_training.py --model_path checkpoints/sonic-mini --data_root examples/clips --output_dir "$output" \
    --train_batch_size 2 --learning_rate 1e-4 --max_train_steps 20 --save_steps 20 --logging_steps 5 --validation_steps 20 \
    --num_workers 2
"$python" sonic_demo.py --checkpoint "$output/checkpoint-20" --image examples/portrait.jpg --audio examples/audio.wav \
    --output "$output/portrait.mp4"
echo "the video is in $PWD/$output/portrait.mp4"
