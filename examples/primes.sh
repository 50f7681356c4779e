#!/bin/sh
# Primes from $1 up to but not including $2, a line each.
n=$1
while [ "$n" -lt "$2" ]; do
    d=2
    while [ $((d * d)) -le "$n" ] && [ $((n % d)) -ne 0 ]; do d=$((d + 1)); done
    [ $((d * d)) -gt "$n" ] && echo "$n"
    n=$((n + 1))
done
exit 0
