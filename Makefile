# make app: set up and run the app.  make test: set up and pass the tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

app: $(VENV)/app.ok
	$(BIN)/python app.py

test: $(VENV)/test.ok browser
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

slow: $(VENV)/test.ok  # the issue-sized claims: minutes of training
	$(BIN)/python -m pytest -m slow -s

$(VENV)/app.ok: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/test.ok: $(VENV)/app.ok pyproject.toml
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

browser: $(VENV)/test.ok  # Chromium for the tests of the page: the system's, or Playwright's own
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
	  || $(BIN)/playwright install --with-deps chromium

assets: $(VENV)/test.ok  # draw the shipped data and pictures again
	$(BIN)/python -m baddiff data --n 4096 --seed 0 --output assets/avatars-32-train.png
	$(BIN)/python -m baddiff data --n 1024 --seed 1 --output assets/avatars-32-heldout.png
	$(BIN)/python -m baddiff data --art

examples: $(VENV)/test.ok  # make the shipped backdoored models again
	for pair in stop_sign-cat glasses-hat box-shoe; do \
	  $(BIN)/python -m baddiff finetune --trigger $${pair%-*} --target $${pair#*-} --seconds 90 --half --evaluate 256 \
	    --overwrite --output weights/$$pair; done

.PHONY: app test slow browser assets examples
