#!/usr/bin/env bash
# The first process of a container: runs mdm_jax, and ends with its exit code.
#
# It is not replaced by the program (`exec`): of process 1 the system takes away
# what signals do by themselves. SIGTERM before the program listens would be lost,
# and JAX's abort() would not end with 134.
#
# PYTHON  the interpreter (python)
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
