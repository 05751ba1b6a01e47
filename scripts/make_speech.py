"""Collects the speech that sonic-mini is built and measured with: synthetic voices and real recordings.

    python scripts/make_speech.py OUTPUT

writes OUTPUT/training and OUTPUT/unseen, each with espeak-*.wav (espeak-ng: voices, languages, speeds and pitches) and
recorded-*.wav (telephone prompts read by people, from Debian's asterisk packages, whose copyright files name the speakers
and the licences: CC BY-SA 3.0 for most). None of it is shipped. No voice is in both. Needs
espeak-ng and apt-get (Debian or Ubuntu); the packages are unpacked, not installed. 2 hours of speech, a minute to make.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere, without an install

from sonic.config import SAMPLE_RATE, UserError
from sonic.flags import run
from sonic.sound import load_audio

# Debian package -> name of its speaker; who is unseen is never trained on.
RECORDED = {
    "training": {
        "asterisk-core-sounds-en-g722": "en-allison",
        "asterisk-core-sounds-es-g722": "es-allison",
        "asterisk-core-sounds-fr-g722": "fr-june",
        "asterisk-prompt-fr-armelle": "fr-armelle",
    },
    "unseen": {
        "asterisk-core-sounds-it-g722": "it-carlo",
        "asterisk-core-sounds-ru-g722": "ru-ivr",
        "asterisk-prompt-it-menardi-wav": "it-menardi",
        "asterisk-prompt-es-co": "es-co",
    },
}
# espeak-ng variants; each speaks every language below
SPEAKERS = {"training": ("f1", "f2", "f3", "m1", "m2", "m3", "m4", "m7"), "unseen": ("f4", "f5", "m5", "m6")}
TEXTS = {
    "en-us": "The morning bus was late again, so we walked along the river and talked about the weather. My sister paints "
    "old boats every summer; nobody knows how many she has finished. Would you put the blue cup on the table, please?",
    "de": "Heute Morgen war der Himmel ganz blau, und wir sind bis zum See gelaufen. Ob der Zug wohl pünktlich ist? Meine "
    "Oma backt jeden Sonntag einen Kuchen mit Äpfeln, und alle kommen vorbei, auch die Nachbarn von gegenüber.",
    "fr": "Ce matin, nous avons vu un petit bateau bleu qui passait sous le vieux pont. Ma voisine joue du piano tous les "
    "soirs, et moi, j'ouvre la fenêtre pour écouter. Où sont donc passées les clefs de la maison?",
    "es": "Mi hermano pinta una mesa verde mientras la lluvia golpea la ventana. Vamos a comprar pan, uvas y un poco de queso "
    "para la cena de mañana. ¿Quién abrió la puerta del jardín esta noche?",
    "it": "La mattina beviamo un caffè in piazza e guardiamo passare la gente. Dopo pranzo piove sempre, ma oggi il cielo è "
    "sereno e i bambini giocano vicino alla fontana. Che ore sono, per favore?",
    "cmn": "今天早上天气很好，我们一起去河边散步，看见很多小鸟。请把蓝色的杯子放在桌子上，"
    "然后打开窗户，谢谢。他问我们明天有没有时间一起吃饭。",
}
NOT_SPEECH = ("silence", "digits", "letters", "phonetic", "beep", "tone")
SECONDS = 20  # of a recording: prompts are joined up to this length
SHORTEST = 0.8  # seconds of a prompt


def synthetic(folder: Path, speakers: tuple[str, ...]) -> None:
    """One recording per speaker and language, each with its own speed and pitch."""
    for index, speaker in enumerate(speakers):
        for place, (language, text) in enumerate(TEXTS.items()):
            speed, pitch = 130 + (index * 17 + place * 23) % 60, 30 + (index * 13 + place * 19) % 45
            target = folder / f"espeak-{language}-{speaker}.wav"
            voice = ["-v", f"{language}+{speaker}", "-s", str(speed), "-p", str(pitch)]
            subprocess.run(["espeak-ng", *voice, "-w", str(target), text], check=True)


def recorded(folder: Path, packages: dict[str, str]) -> None:
    """The prompts of each speaker, joined to recordings of 20 s."""
    for package, speaker in packages.items():
        with tempfile.TemporaryDirectory() as place:
            subprocess.run(["apt-get", "download", "-qq", package], cwd=place, check=True)
            (archive,) = Path(place).glob("*.deb")
            subprocess.run(["dpkg", "-x", str(archive), f"{place}/unpacked"], check=True)
            parts, number = [], 0
            for path in sorted(Path(place, "unpacked").rglob("*")):
                if path.suffix not in (".g722", ".gsm", ".wav") or any(word in str(path) for word in NOT_SPEECH):
                    continue
                try:
                    prompt = load_audio(path)
                except UserError:  # a few prompts of these packages are empty
                    continue
                if len(prompt) >= SHORTEST * SAMPLE_RATE:
                    parts.append(prompt)
                if sum(map(len, parts)) >= SECONDS * SAMPLE_RATE:
                    target = folder / f"recorded-{speaker}-{number:02d}.wav"
                    soundfile.write(target, np.concatenate(parts), SAMPLE_RATE, subtype="PCM_16")
                    parts, number = [], number + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    arguments = parser.parse_args()
    for part in ("training", "unseen"):
        folder = arguments.output / part
        folder.mkdir(parents=True, exist_ok=True)
        try:
            synthetic(folder, SPEAKERS[part])
            recorded(folder, RECORDED[part])
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"speech cannot be made ({error}): apt-get install espeak-ng, and be online") from error
        print(f"{len(list(folder.iterdir()))} recordings in {folder}")


if __name__ == "__main__":
    run(main)
