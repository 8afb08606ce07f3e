# shellcheck shell=bash
# Sourced by the other scripts; not run by itself.

# Ends the script where a variable is empty: one line for all that are.
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

# Runs a command; with DRY_RUN=1 it is only printed, as a shell would read it.
call() {
  if dry; then
    printf '%q' "$1"
    printf ' %q' "${@:2}"
    echo
  else
    "$@"
  fi
}
