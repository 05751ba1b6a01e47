#!/usr/bin/env bash
# Lint, format check and all tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# The tests of the web page drive a browser. Where there is none and none can be had, they skip.
if ! command -v chromium > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "installing chromium (once)"
    patience="-o Acquire::http::Timeout=10 -o Acquire::Retries=0"
    { timeout 120 apt-get $patience update && timeout 300 apt-get $patience install -y --no-install-recommends chromium; } \
        > /dev/null 2>&1 || echo "chromium cannot be installed here"
fi
# No test may reach for the network: what is not in the repository is not there.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
exec .venv/bin/python -m pytest "$@"
