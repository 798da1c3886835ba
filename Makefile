# make demo   set-up, the published checkpoint on tasks it has not seen, then a small run of both stages
# make test   set-up, then the suite (WORKERS=2 processes)
# make setup, make assets   their parts
# make assets LLM=gemma   a second language model, Gemma 3 270M, under the Gemma terms
# make tables  the paper's tables and pictures again from the lines in results/, without training
# make table2 SCALE=pocket-gpu   a table or figure of the paper, or (lr, ratios, kv) of ours: table1 table2
#   table3 table6 table7 fig3 fig4 fig5 ablations lr ratios kv
# A CPU build of torch, where the default would be a GPU build of several GB: make setup
#   PIP_FLAGS="--index-url ..." with the address that PyTorch's own installation page gives for CPU.

PYTHON ?= python3
PIP_FLAGS ?=
WORKERS ?= 2
BIN := .venv/bin
DEMO := out/demo
PUBLISHED := checkpoints/smollm2-135m.safetensors
NEWLINE := --preset pocket --template newline
MADE := $(NEWLINE) --tasks functions --k 8
# 10 of the 46 held-out functions, of every kind; both checkpoints' tables in one file: what is there is not
# done again
SOME := "noun: hashtag" "verb: she" "adjective: very" "trio: last" "number: in words" "number: percent" \
	"country: capital" "date: month" "path: ending" "sentence: object"
TABLE := --only $(SOME) --seeds 100 --limit 4 --methods zero_shot last_l icl mend mend_swapped \
	--out $(DEMO)/results.jsonl
SMALL := --distiller kv:32 --distill-len 16 --lr 1e-3 --steps 12 --eval-every 12 --eval-queries 1 \
	--eval-tasks 12
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_FLAGS)
PAPER := tables table1 table2 table3 table6 table7 fig3 fig4 fig5 ablations lr ratios kv
# threads that spin while they wait make a training step four times slower where other work shares the cores
export GOMP_SPINCOUNT ?= 100

.PHONY: demo test setup assets lint $(PAPER)

setup: .venv/done

# without compiling all that a package has: what is imported is compiled then, and 40 of 75 seconds are saved
.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch .venv/done

.venv/extra: .venv/done requirements-extra.txt
	$(PIP) -r requirements.txt -r requirements-extra.txt
	touch .venv/extra

assets: setup
	$(BIN)/python -m sources.assets $(if $(filter gemma,$(LLM)),--only gemma)

# fetches the LLM (93 MB) and a text (4.5 MB) where they are missing; the word functions are made on the spot
demo: setup
	$(BIN)/python evaluate.py $(MADE) --checkpoint $(PUBLISHED) --distill-len 16 $(TABLE)
	$(BIN)/python train_pretrain.py $(NEWLINE) --corpus sotu $(SMALL) --batch-size 2 --eval-docs 8 \
		--out-dir $(DEMO)/pretrain --resume
	$(BIN)/python train_finetune.py $(MADE) $(SMALL) --init-from $(DEMO)/pretrain --out-dir $(DEMO)/finetune \
		--resume
	$(BIN)/python evaluate.py $(MADE) --checkpoint $(DEMO)/finetune $(TABLE)
	$(BIN)/python -m paper.figures curves $(DEMO)/pretrain $(DEMO)/finetune --out $(DEMO)

# the paper's tables and figures: make table2 SCALE=pocket-gpu (paper/runs/settings.sh has the other settings)
$(PAPER): setup
	PYTHON=$(BIN)/python paper/runs/$@.sh

# in as many processes as WORKERS says; those still busy give tests away at the end
test: .venv/extra
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: setup
	$(BIN)/ruff check .
