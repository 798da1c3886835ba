#!/usr/bin/env bash
# Files that hypothesis makes, then kills, signals and full disks at random moments of both stages and of
# evaluation, compared with an uninterrupted run.
#   FUZZ=2000 KILLS=120 paper/runs/soak.sh
cd "$(dirname "$0")/../.."
set -e
FUZZ=${FUZZ:-2000} "${PYTHON:-.venv/bin/python}" -m pytest -q tests/test_fuzz.py
"${PYTHON:-.venv/bin/python}" tests/soak.py --kills "${KILLS:-120}"
