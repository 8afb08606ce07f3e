#!/usr/bin/env bash
# The first process of a container: runs mdm_jax and returns its exit code.
#
# It does not `exec` the program: the kernel ignores the default actions of
# signals for process 1. A SIGTERM before the program has a handler would be
# lost, and JAX's abort() would not exit with 134.
#
# PYTHON  the interpreter (default: python)
set -u

told=0
program=
trap 'told=1; [[ -z $program ]] || kill -TERM "$program" 2> /dev/null' TERM INT

"${PYTHON:-python}" -m mdm_jax.main "$@" <&0 & # or it would have no stdin
program=$!
if ((told)); then kill -TERM "$program" 2> /dev/null; fi # it came before the program

wait "$program"
code=$?
while ((told)); do # a signal to this script ends `wait`, not the program
  told=0
  wait "$program" 2> /dev/null
  again=$? # 127: it had ended before
  if ((again != 127)); then code=$again; fi
done
exit "$code"
