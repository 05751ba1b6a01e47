# Sourced by the other scripts: goes to the project, and makes sure that .venv holds what requirements.txt asks for.

CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# The stamp makes a second call start at once; it is written only when everything was installed.
stamp=.venv/installed-requirements.txt
# An environment that still bears this mark was left by a call that was cut while making it: nothing in it can be trusted.
unfinished=.venv/unfinished

if [ -e "$unfinished" ] || [ ! -x .venv/bin/python ] || ! cmp -s requirements.txt "$stamp"; then
    # Where the mark says nothing, pip does: its own record is the last thing that making an environment writes.
    if [ -e "$unfinished" ] || ! .venv/bin/python -m pip show --quiet pip > /dev/null 2>&1; then
        maker=
        for candidate in python3.11 python3.12 python3.10 python3; do
            if command -v "$candidate" > /dev/null &&
                "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2> /dev/null; then
                maker=$candidate
                break
            fi
        done
        if [ -z "$maker" ]; then
            echo "error: Python 3.10, 3.11 or 3.12 with venv is needed" >&2
            exit 2
        fi
        echo "making .venv with $("$maker" --version)"
        # Made in place, as its scripts carry its path. The mark is there before anything else, and goes last.
        rm -rf .venv/bin .venv  # bin first: what is left of a removal that was cut is no environment either
        mkdir .venv
        touch "$unfinished"
        "$maker" -m venv .venv || exit 1
    fi
    echo "installing requirements.txt into .venv (once)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt || exit 1
    cp requirements.txt "$stamp"
    rm -f "$unfinished"
fi
