#!/usr/bin/env python3
"""The Mandelbrot set, a job a row, and a picture of it at the end: in colour with matplotlib, else
in grey.

    python examples/mandelbrot.py [PICTURE.png]
"""

import struct
import sys
import zlib

import dispy

WIDTH, HEIGHT, STEPS = 360, 240, 255


def row(y):
    """Steps until z*z + c leaves the circle of radius 2, for each point of one row; STEPS: it does
    not."""
    found = bytearray()
    for x in range(WIDTH):
        c, z = complex(3 * x / WIDTH - 2.1, 2 * y / (HEIGHT - 1) - 1), 0j
        found.append(next((n for n in range(STEPS) if abs(z := z * z + c) > 2), STEPS))
    return bytes(found)


def write_grey(path, rows):
    """A PNG file: signature and three chunks; each row begins with 0, for `no filter`."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I',
                                                                        zlib.crc32(kind + data))
    pixels = b''.join(b'\0' + row for row in rows)
    with open(path, 'wb') as file:
        file.write(b'\x89PNG\r\n\x1a\n'
                   + chunk(b'IHDR', struct.pack('>IIBBBBB', WIDTH, HEIGHT, 8, 0, 0, 0, 0))
                   + chunk(b'IDAT', zlib.compress(pixels)) + chunk(b'IEND', b''))


path = sys.argv[1] if len(sys.argv) > 1 else 'mandelbrot.png'
with dispy.JobCluster(row, nodes='local') as cluster:
    rows = list(cluster.map(range(HEIGHT)))
# 0, black, in the set
shades = [bytes(255 - round((n * STEPS) ** 0.5) for n in row) for row in rows]
try:
    from matplotlib.image import imsave
except ImportError:
    write_grey(path, shades)
else:
    imsave(path, [list(row) for row in shades], cmap='magma')
inside = sum(row.count(STEPS) for row in rows)
print('%d x %d points, %.1f %% in the set; see %s'
      % (WIDTH, HEIGHT, 100 * inside / (WIDTH * HEIGHT), path))
