#!/usr/bin/env python3
"""The interface of concurrent.futures: any function a call, here with the nodes of this machine."""

import concurrent.futures
import math

import dispy


def is_prime(n):
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


with dispy.DispyExecutor(nodes='local') as executor:
    numbers = range(10 ** 6, 10 ** 6 + 200)
    found = [n for n, prime in zip(numbers, executor.map(is_prime, numbers, chunksize=20)) if prime]
    print('primes:', *found[:5])
    futures = {executor.submit(math.factorial, n): n for n in (5, 10, -1)}
    for future in concurrent.futures.as_completed(futures):
        print(futures[future], '->', future.exception() or future.result())
