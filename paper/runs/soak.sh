#!/usr/bin/env bash
# Kills, signals and full disks at random moments of both stages and of evaluation, compared with an uninterrupted run.
#   KILLS=50 paper/runs/soak.sh
cd "$(dirname "$0")/../.."
"${PYTHON:-.venv/bin/python}" tests/soak.py --kills "${KILLS:-50}"
