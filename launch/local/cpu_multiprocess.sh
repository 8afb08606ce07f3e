#!/usr/bin/env bash
# Runs mdm_jax in N processes on this machine's CPU, to simulate a cluster.
#
#   launch/local/cpu_multiprocess.sh N [ARGS...]
#
# ARGS are those of `python -m mdm_jax.main`, the same for every process. Each
# line of output begins with its process. SIGTERM and SIGINT are forwarded to all
# processes; the exit code is the highest of theirs.
#
# PYTHON              the interpreter (default: python)
# JAX_NUM_CPU_DEVICES fake devices per process (default: 1)
set -u

if [[ ! "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 N [ARGS...], N being the number of processes" >&2
  exit 2
fi
count=$1
shift
python=${PYTHON:-python}

export JAX_PLATFORMS=cpu
export JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-1}
# Otherwise threads that wait for other devices could use up the pool.
export NPROC=${NPROC:-16}
export PYTHONUNBUFFERED=1

port=$("$python" -c 'import socket
with socket.socket() as s:
  s.bind(("localhost", 0))
  print(s.getsockname()[1])') || exit 1
pipes=$(mktemp -d) || exit 1
trap 'rm -rf "$pipes"' EXIT

# Not with awk or sed, some of which buffer more than a line.
prefix() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    printf '[%s] %s\n' "$1" "$line"
  done
}

pids=()
told=0
# Forwarded as SIGTERM: a terminal sends SIGINT to every process anyway, and a
# second one would make them exit without saving.
tell() {
  told=1
  ((${#pids[@]})) && kill -TERM "${pids[@]}" 2> /dev/null
}
trap tell INT TERM

printers=()
for ((i = 0; i < count; i++)); do
  # Not `program | printer &`: of that, only the printer's number is known.
  mkfifo "$pipes/$i" || exit 1
  prefix "$i" < "$pipes/$i" &
  printers+=($!)
  "$python" -m mdm_jax.main --coordinator="localhost:$port" \
    --num_processes="$count" --process_id="$i" "$@" > "$pipes/$i" 2>&1 &
  pids+=($!)
done
if ((told)); then tell; fi # it came before there was anyone to tell

highest=0
for pid in "${pids[@]}"; do
  told=0
  wait "$pid"
  code=$?
  while ((told)); do # a signal to this script ends `wait`, not the process
    told=0
    wait "$pid" 2> /dev/null
    again=$? # 127: it had ended before
    if ((again != 127)); then code=$again; fi
  done
  if ((code > highest)); then highest=$code; fi
done
wait "${printers[@]}"
exit "$highest"
