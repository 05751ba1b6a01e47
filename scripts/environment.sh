# Sourced by the other scripts: goes to the project, and makes sure that .venv holds what requirements.txt asks for.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if [ ! -x .venv/bin/python ]; then
    for candidate in python3.11 python3.12 python3.10 python3; do
        if command -v "$candidate" > /dev/null &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2> /dev/null; then
            python="$candidate"
            break
        fi
    done
    if [ -z "${python:-}" ]; then
        echo "error: Python 3.10, 3.11 or 3.12 with venv is needed" >&2
        exit 2
    fi
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv || exit 1
fi

# The stamp makes a second call start at once; it is written only when everything was installed.
if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
    echo "installing requirements.txt into .venv (once)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt || exit 1
    cp requirements.txt .venv/installed-requirements.txt
fi
