# Sourced by the other scripts from the repository's root. Creates .venv once, installs requirements.txt into it (again if that
# file has changed), and puts it on PATH. With VENV=none, the Python on PATH is used as it is.
VENV="${VENV:-.venv}"
if [ "$VENV" != none ]; then
  if [ ! -x "$VENV/bin/python" ]; then
    echo "making $VENV"
    "${PYTHON:-python3}" -m venv "$VENV"
  fi
  if ! cmp -s requirements.txt "$VENV/requirements.installed"; then
    echo "installing requirements.txt into $VENV (about 5 GB; 2 to 4 minutes on a fast line)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$VENV/requirements.installed"
  fi
  export PATH="$(cd "$VENV" && pwd)/bin:$PATH"
fi
