#!/usr/bin/env bash
# Install what tests/cluster needs from Debian: Slurm's daemons and commands, munge, and the tools for namespaces.
# Without root or apt it says so and succeeds: the tests then skip themselves with the reason.
set -euo pipefail

packages=()
for pair in slurmctld:slurmctld slurmd:slurmd srun:slurm-client munged:munge ip:iproute2 unshare:util-linux ps:procps; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%:*}" >/dev/null || packages+=("${pair##*:}")
done
[ ${#packages[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "tests/cluster will be skipped: ${packages[*]} not installed, and this is not root on a machine with apt"
  exit 0
fi

export DEBIAN_FRONTEND=noninteractive
install() { apt-get install --yes --quiet --no-install-recommends "${packages[@]}"; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! install >"$log" 2>&1 && ! { apt-get update --quiet && install; } >"$log" 2>&1; then
  tail -n 5 "$log"
  echo "tests/cluster will be skipped: ${packages[*]} could not be installed"
fi
