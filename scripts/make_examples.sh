#!/usr/bin/env bash
# Rebuilds examples/ from nothing: synthetic speech, the puppet clips, the portrait and the speech to try with it.
#
#   scripts/make_examples.sh [FOLDER]     (default: examples/ of this repository)
#
# Needs espeak-ng (apt-get install espeak-ng) and the repository's .venv (scripts/test.sh makes it). About a minute.
set -euo pipefail
[ $# -eq 0 ] || set -- "$(realpath -m "$1")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
examples=${1:-examples}
python=.venv/bin/python

command -v espeak-ng >/dev/null || { echo "make_examples.sh needs espeak-ng: apt-get install espeak-ng" >&2; exit 2; }
[ -x "$python" ] || { echo "make_examples.sh needs the repository's .venv: run scripts/test.sh once" >&2; exit 2; }
speech=$(mktemp -d)
trap 'rm -r "$speech"' EXIT

# say NAME VOICE SPEED(words per minute) PITCH(0-99) TEXT
say() { espeak-ng -v "$2" -s "$3" -p "$4" -w "$speech/$1.wav" "$5"; }

say 01 en-us+f1 150 55 "The morning bus was late again, so we walked along the river and talked about the weather."
say 02 en-us+m1 165 40 "Please put the blue cup on the table, next to the open window, and come back soon."
say 03 en-gb+f2 145 60 "My sister paints old boats every summer. Nobody knows how many she has finished."
say 04 en-gb+m2 170 35 "We moved five heavy boxes up the stairs, and then we ate a very large soup."
say 05 en-us+f3 160 70 "Who would have believed that a small owl could open the door all by itself?"
say 06 en-us+m3 140 45 "Above the valley a few white clouds were waiting. By noon, they had all gone away."
say 07 de+f1 150 55 "Heute Morgen war der Himmel ganz blau, und wir sind bis zum See gelaufen."
say 08 de+m1 160 40 "Meine Oma backt jeden Sonntag einen Kuchen mit Äpfeln, und alle kommen vorbei."
say 09 de+f2 170 65 "Ob der Zug wohl pünktlich ist? Wir warten schon eine halbe Stunde am Bahnhof."
say 10 de+m4 145 50 "Im Garten blühen fünf rote Tulpen, aber die Bienen mögen lieber den Klee."
say 11 fr+f1 155 55 "Ce matin, nous avons vu un petit bateau bleu qui passait sous le vieux pont."
say 12 fr+m2 150 40 "Ma voisine joue du piano tous les soirs, et moi, j'ouvre la fenêtre pour écouter."
say 13 es+f2 160 60 "Mi hermano pinta una mesa verde mientras la lluvia golpea la ventana."
say 14 es+m3 150 45 "Vamos a comprar pan, uvas y un poco de queso para la cena de mañana."
say 15 it+f3 150 60 "La mattina beviamo un caffè in piazza e guardiamo passare la gente."
say 16 cmn+f1 150 50 "今天早上天气很好，我们一起去河边散步，看见很多小鸟。"
say 17 cmn+m1 145 45 "请把蓝色的杯子放在桌子上，然后打开窗户，谢谢。"
say 18 en-us+m7 155 50 "One apple, two pears, and a bowl of plums: that was all they bought for the whole week."

"$python" -m sonic.puppets --output "$examples/clips" --speech "$speech" --clips 20 --seconds 4 --seed 7 \
    --head_amplitude 0.3 1.6 --expression_amplitude 0.3 1.6

# The portrait and the voice to animate it with: neither occurs in the clips.
espeak-ng -v en-us+f5 -s 170 -p 50 -w "$speech/voice.wav" \
    "Hello! Lend me your voice, and I will move my mouth with it."
"$python" - "$speech/voice.wav" "$examples" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from sonic.config import SAMPLE_RATE
from sonic.sound import load_audio
from sonic.puppets import Identity, Pose, draw

voice, examples = sys.argv[1], Path(sys.argv[2])
portrait = draw(Identity.random(np.random.default_rng(2013)), Pose(), 512)
Image.fromarray(portrait).save(examples / "portrait.jpg", quality=92)
soundfile.write(examples / "audio.wav", load_audio(voice), SAMPLE_RATE, subtype="PCM_16")
PYTHON
du -sh "$examples"
