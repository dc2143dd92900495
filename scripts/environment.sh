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
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip  # $VENV was not made to its end
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$VENV/requirements.installed"
  fi
  export PATH="$(cd "$VENV" && pwd)/bin:$PATH"
fi

# require_known NAMES CHOICES: stops the script if one of NAMES is not among CHOICES.
require_known() {
  local name
  for name in $1; do
    if [[ " $2 " != *" $name "* ]]; then echo "error: '$name' found, names out of $2 wanted" >&2; exit 2; fi
  done
}
