#!/usr/bin/env python3
"""Classes: a method as the computation, instances as arguments and as results; nothing has to be
installed on nodes."""

import dispy


class Ball:
    def __init__(self, height, speed=0.0):
        self.height, self.speed = height, speed   # m, m/s upwards

    def __repr__(self):
        return 'Ball(%.2f m, %.2f m/s)' % (self.height, self.speed)


class Planet:
    def __init__(self, gravity):
        self.gravity = gravity   # m/s2

    def fall(self, ball, seconds, steps=100000):
        """The job; the planet goes to each node once, a ball with each job."""
        step = seconds / steps
        for _ in range(steps):
            ball.speed -= self.gravity * step
            ball.height += ball.speed * step
            if ball.height < 0:
                ball.height, ball.speed = -ball.height, -ball.speed
        return ball


for name, planet in (('earth', Planet(9.81)), ('moon', Planet(1.62))):
    with dispy.JobCluster(planet.fall, nodes='local') as cluster:
        jobs = [cluster.submit(Ball(height), seconds=1.0) for height in (10, 20)]
        for job in jobs:
            ball = job()   # another object than the one that was sent
            print('%s: %r after %.1f s, a %s' % (name, ball, 1.0, type(ball).__name__))
