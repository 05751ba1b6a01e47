#!/usr/bin/env bash
# From a fresh clone to a talking portrait: trains the small model a little further on examples/clips, animates
# examples/portrait.jpg with examples/audio.wav, and measures how well the mouth follows.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export HF_HUB_OFFLINE=1
# glibc would give large blocks back and fetch them anew at every layer, which costs a CPU half of its time.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
python=.venv/bin/python
output=outputs/quickstart
steps=40

rm -rf "$output"/checkpoint-* # of an earlier call; what it prepared is used again
"$python" sonic_training.py --model_path checkpoints/sonic-mini --data_root examples/clips --output_dir "$output" \
    --train_batch_size 2 --learning_rate 2e-5 --lip_loss_weight 6 --max_train_steps "$steps" --save_steps "$steps" \
    --logging_steps 10 --validation_steps "$steps" --num_workers 2
"$python" sonic_demo.py --checkpoint "$output/checkpoint-$steps" --image examples/portrait.jpg --audio examples/audio.wav \
    --output "$output/portrait.mp4"
"$python" -m sonic.evaluation "$output/portrait.mp4" --portrait examples/portrait.jpg
echo "the video is in $PWD/$output/portrait.mp4"
