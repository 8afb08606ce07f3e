# shellcheck shell=bash
# Sourced by the other scripts; not run by itself.

# Exits if any of the variables is empty, with one line that names them all.
#   need NAME...
need() {
  local name missing=()
  for name in "$@"; do
    [[ -n ${!name:-} ]] || missing+=("$name")
  done
  if ((${#missing[@]})); then
    echo "$0: not set: ${missing[*]} (see launch/env.example)" >&2
    exit 2
  fi
}

dry() {
  [[ ${DRY_RUN:-0} != 0 ]]
}

# Runs a command; with DRY_RUN=1 only prints it, quoted for a shell.
call() {
  if dry; then
    printf '%q' "$1"
    printf ' %q' "${@:2}"
    echo
  else
    "$@"
  fi
}
