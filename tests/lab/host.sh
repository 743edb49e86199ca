# SPDX-FileCopyrightText: kvmops.backup contributors
# SPDX-License-Identifier: GPL-3.0-or-later
# shellcheck shell=bash
# Sourced by run-tests and quickstart: packages, Python environments and a copy of the collection where Ansible looks for it.

cache=${KVMOPS_LAB_CACHE:-${XDG_CACHE_HOME:-/var/cache}/kvmops-lab}
export DEBIAN_FRONTEND=noninteractive
# The distribution's Python first: it has the libvirt binding. Version managers' shims break Ansible's search for interpreters.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

# The distribution's packages, unless all are there.
packages() { # NAME…
  dpkg-query -W -f '${Status}\n' "$@" 2>/dev/null | grep -c '^install ok installed' | grep -qx $# && return
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "$@" </dev/null
}

# A Python environment over the distribution's (or over $python), made once for this list of requirements and put first on PATH.
environment() { # NAME REQUIREMENT…
  local directory=$cache/$1
  shift
  if [ "$(cat "$directory/requirements" 2>/dev/null)" != "$*" ]; then
    rm -rf "$directory"
    "${python:-/usr/bin/python3}" -m venv --system-site-packages "$directory"
    "$directory/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    echo "$*" >"$directory/requirements"
  fi
  PATH=$directory/bin:$PATH
}

# A second environment, beside that of the tests: the newest ansible-core, which needs a newer Python than some distributions have.
newest_core() {
  local python candidate
  for candidate in /usr/bin/python3.1{4,3,2} "$HOME"/.pyenv/versions/3.1{4,3,2}*/bin/python3; do
    [ ! -x "$candidate" ] || { python=$candidate && break; }
  done
  [ -n "${python-}" ] || { echo "ansible-core 2.21 needs Python 3.12 or later, and none was found" >&2 && return 1; }
  (environment newest-core 'ansible-core>=2.21,<2.22')
}

# A copy of the checkout in ansible_collections/kvmops/backup below a new directory; sets $work and changes into the copy.
copy_collection() { # CHECKOUT
  work=$(mktemp -d /var/tmp/kvmops-work.XXXXXX)
  trap 'cd /; rm -rf "$work"' EXIT
  chmod 711 "$work"
  mkdir -p "$work/collections/ansible_collections/kvmops/backup"
  cd "$work/collections/ansible_collections/kvmops/backup" || return
  tar -C "$1" --exclude-vcs --exclude=./tests/output --exclude=__pycache__ --exclude='./.*_cache' --exclude=./.ansible --exclude=./.hypothesis -cf - . | tar -xf -
  export ANSIBLE_COLLECTIONS_PATH=$work/collections PYTHONPATH=$work/collections PYTHONDONTWRITEBYTECODE=1
}
