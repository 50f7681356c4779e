#!/usr/bin/env python3
"""SHA-256 of every file below a directory, computed on all CPUs; like `sha256sum` over `find`,
spread out.

    python examples/checksum_tree.py DIR [--nodes HOST[:PORT] ...] [--output FILE]

Without --nodes, a node is started on this machine. With nodes on other hosts, DIR must be reachable
there under the same path (a shared file system), as it is the nodes that read the files.
"""

import argparse
import os
import sys
import time

import dispy


def checksums(paths):
    """The job: digests of some files. Returns a list of (path, bytes, digest or None, error or
    None)."""
    import hashlib
    found = []
    for path in paths:
        digest, size = hashlib.sha256(), 0
        try:
            with open(path, 'rb') as file:
                for piece in iter(lambda: file.read(1 << 20), b''):
                    digest.update(piece)
                    size += len(piece)
        except OSError as exc:
            found.append((path, size, None, str(exc)))
        else:
            found.append((path, size, digest.hexdigest(), None))
    return dispy_node_name, found   # noqa: F821 - a name that every job knows


def batches(root, most_files=200, most_bytes=16 << 20):
    """Paths of regular files below `root`, in batches that are neither tiny nor huge."""
    batch, size = [], 0
    for directory, names, files in os.walk(root):
        names.sort()
        for name in sorted(files):
            path = os.path.join(directory, name)
            if not os.path.isfile(path) or os.path.islink(path):
                continue
            batch.append(path)
            size += os.path.getsize(path)
            if len(batch) >= most_files or size >= most_bytes:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def parse_node(text):
    host, _, port = text.rpartition(':') if text.count(':') == 1 else (text, '', '')
    return (host, int(port)) if port else host


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('directory', metavar='DIR')
    parser.add_argument('--nodes', nargs='+', type=parse_node, default='local',
                        metavar='HOST[:PORT]')
    parser.add_argument('--output', metavar='FILE',
                        help='write lines "digest  path" there, as sha256sum does')
    args = parser.parse_args()
    if not os.path.isdir(args.directory):
        parser.error('%s is not a directory' % args.directory)
    start, lines, errors, by_node = time.time(), [], 0, {}
    with dispy.JobCluster(checksums, nodes=args.nodes) as cluster:
        jobs = [cluster.submit(batch) for batch in batches(os.path.abspath(args.directory))]
        for job in jobs:
            result = job()
            if result is None:
                print(job.exception, file=sys.stderr)
                errors += 1
                continue
            node, found = result
            count = by_node.setdefault('%s (%s)' % (node, job.ip_addr), [0, 0, 0, 0.0])
            count[0] += 1
            count[3] += job.end_time - job.start_time
            for path, size, digest, error in found:
                count[1] += 1
                count[2] += size
                if error:
                    errors += 1
                    print(error, file=sys.stderr)
                else:
                    lines.append('%s  %s' % (digest, os.path.relpath(path, args.directory)))
        cpus = sum(node.cpus for node in cluster.status().nodes)
    if args.output:
        with open(args.output, 'w', errors='surrogateescape') as file:
            file.write(''.join(line + '\n' for line in lines))
    seconds = time.time() - start
    print('%-36s %8s %10s %12s %10s' % ('Node', 'Jobs', 'Files', 'MB', 'Job time s'))
    for name, (count, files, size, busy) in sorted(by_node.items()):
        print('%-36s %8d %10d %12.1f %10.2f' % (name, count, files, size / 1e6, busy))
    print('%d files, %.1f MB in %.2f s on %d CPUs, %d errors'
          % (len(lines), sum(count[2] for count in by_node.values()) / 1e6, seconds, cpus, errors))
    return 1 if errors else 0


if __name__ == '__main__':
    sys.exit(main())
