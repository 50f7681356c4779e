"""What jobs need beside CPUs: what a node finds and offers, how the schedule counts it, and which
worker of a node has it."""

import random

import pytest

import dispy
from dispy import ENDED, JobParked, JobState, NodeAway, NodeLost, NodeReady, request_of
from dispynode import (Equip, GpuSearch, Node, Offer, Outcome, Retire, StartWorker, WorkerGone,
                       WorkerInitialized, WorkerLeft, find_offer, is_request)
from talk_node import Talk as NodeTalk
from talk_node import fed, only, rows, texts
from talk_schedule import Talk, job, jobs, sent

GPU = (('gpu', 1), )
GPUS = (('gpu', 2), )
GIB = 1 << 30

# -- what a host has -------------------------------------------------------------------------------

LIST = '''GPU 0: NVIDIA A100 (UUID: GPU-aa)
GPU 1: NVIDIA A100 (UUID: GPU-bb)
  MIG 1g.5gb      Device  0: (UUID: MIG-c1)
  MIG 1g.5gb      Device  1: (UUID: MIG-c2)
'''


def search(environ=(), printed='', files=()):
    """A host whose nvidia-smi prints this, and which has these files with their contents."""
    files = dict(files)

    def names_in(directory):
        return sorted({
            name[len(directory) + 1:].split('/')[0]
            for name in files if name.startswith(directory + '/')
        })

    return GpuSearch(dict(environ), lambda command: printed, names_in,
                     lambda path: files.get(path, ''))


def kfd(*numbers):
    return {
        '/sys/class/kfd/kfd/topology/nodes/%d/gpu_id' % place: '%d\n' % number
        for place, number in enumerate(numbers)
    }


@pytest.mark.parametrize(
    'host, devices',
    [(search(), []), (search(printed=LIST), ['0', 'MIG-c1', 'MIG-c2']),
     (search({'CUDA_VISIBLE_DEVICES': '1'}, LIST), ['1']),
     (search({'CUDA_VISIBLE_DEVICES': 'GPU-bb,-1,0'}, LIST), ['GPU-bb']),
     (search({'CUDA_VISIBLE_DEVICES': ''}, LIST), []),
     (search({'CUDA_VISIBLE_DEVICES': '0,1,2'}), []),
     (search(files={
         '/dev/nvidia0': '',
         '/dev/nvidia1': '',
         '/dev/nvidiactl': '',
         '/dev/null': ''
     }), ['0', '1']), (search(files=kfd(0, 4711, 4712)), ['0', '1']),
     (search({'HIP_VISIBLE_DEVICES': '1'}, files=kfd(0, 4711, 4712)), ['1']),
     (search({'ROCR_VISIBLE_DEVICES': '3'}, files=kfd(0, 4711, 4712)), ['0'])])
def test_devices_of_a_host_are_found_within_what_the_environment_leaves(host, devices):
    offer = find_offer(['gpu=auto'], host)
    assert list(offer.devices) == devices and offer.counts == ({
        'gpu': len(devices)
    } if devices else {})


def test_an_offer_is_what_the_options_say():
    offer = find_offer(['gpu=2', 'licence=3', 'none=0'], search())
    assert offer == Offer({'gpu': 2, 'licence': 3}, ('0', '1'), ('CUDA_VISIBLE_DEVICES', ))
    assert offer.variables_for({'gpu': [1], 'licence': [0]}) == {'CUDA_VISIBLE_DEVICES': '1'}
    assert offer.variables_for({'licence': [0]}) == {}
    rocm = find_offer(['gpu=1'], search({'HIP_VISIBLE_DEVICES': '3,4'}))
    assert rocm.variables_for({'gpu': [0]}) == {
        'CUDA_VISIBLE_DEVICES': '3',
        'HIP_VISIBLE_DEVICES': '3'
    }
    assert find_offer(['gpu=1'], search({'CUDA_VISIBLE_DEVICES': '5,7'})).devices == ('5', )


@pytest.mark.parametrize('words, told', [(['gpu'], 'NAME=N'), (['gpu=-1'], 'NAME=N'),
                                         (['gpu=1.5'], 'NAME=N'), (['licence=auto'], 'gpu=auto'),
                                         (['=1'], 'NAME=N'), (['a b=1'], 'NAME=N'),
                                         (['gpu=1', 'gpu=2'], 'twice'),
                                         (['memory=5'], 'memory is that of the host'),
                                         (['cpus=2'], '--cpus'), (['x=999999'], '65536 at most'),
                                         (['gpu=3'], 'CUDA_VISIBLE_DEVICES leaves 2 of them: 0,1')])
def test_a_wrong_offer_is_told(words, told):
    with pytest.raises(ValueError, match=told):
        find_offer(words, search({'CUDA_VISIBLE_DEVICES': '0,1'}))


# -- what a job asks for ---------------------------------------------------------------------------


def test_a_request_is_checked_and_put_in_order():
    assert request_of('resources', {
        'licence': 2,
        'gpu': 1,
        'none': 0
    }) == (('gpu', 1), ('licence', 2))
    for value, told in (({
            'gpu': 0.5
    }, 'gpu=0.5 is not a whole number'), ({
            'gpu': -1
    }, 'gpu=-1'), ({
            '': 1
    }, 'is not the name of a resource'), ({
            'memory': 5
    }, 'dispy_memory'), ({
            'cpus': 2
    }, 'dispy_cpus'), ({
            'gpu': 1 << 20
    }, '65536')):
        with pytest.raises(ValueError, match=told):
            request_of('resources', value)
    with pytest.raises(TypeError, match='must be a dict'):
        request_of('resources', ['gpu'])


@pytest.mark.parametrize('rows', [[('gpu', 1)], (('gpu', 1), ('a', 1)), (('gpu', 1), ('gpu', 1)),
                                  (('gpu', 0), ), (('gpu', True), ), (('g p', 1), ), (('gpu', ), ),
                                  ('gpu', ), (('gpu', 1.0), ), ((b'gpu', 1), )])
def test_a_peer_cannot_ask_for_nonsense(rows):
    assert is_request((('a', 1), ('gpu', 2))) and is_request(()) and not is_request(rows)


# -- the schedule ----------------------------------------------------------------------------------


def has(node, cpus=1, comp='c', **stock):
    return NodeReady(node, comp, cpus, [], name=node, stock=stock)


def parked(actions):
    return [(action.work, action.text) for action in actions if type(action) is JobParked]


def test_units_are_counted_as_cpus_are():
    talk, works = Talk(), jobs(3, resources=GPU)
    talk.tell(has('n', 4, gpu=2))
    assert sent(talk.submit(works)) == works[:2]
    assert sent(talk.results('n', works[:1])) == works[2:]
    assert talk.schedule.nodes['n'].stock.used['gpu'] == 2
    talk.results('n', works[1:])
    assert talk.schedule.nodes['n'].stock.used['gpu'] == 0


def test_short_jobs_are_not_sent_to_wait_with_a_device():
    talk = Talk()
    talk.tell(has('n', 1, gpu=1))
    talk.learn(0.0001, times=50)
    works = jobs(5, resources=GPU)
    assert sent(talk.submit(works)) == works[:1]


def test_who_waits_for_a_device_keeps_nobody_else_waiting():
    talk, gpus, others = Talk(), jobs(2, resources=GPU), jobs(2)
    talk.tell(has('n', 2, gpu=1))
    talk.learn(1.0)
    assert sent(talk.submit(gpus + others)) == [gpus[0], others[0]]
    assert sent(talk.results('n', [gpus[0]])) == [gpus[1]]  # it came before


def test_priority_holds_between_jobs_with_and_without_resources():
    talk, low, high = Talk(), job(resources=GPU), job(priority=1)
    assert not sent(talk.submit([low, high]))
    assert sent(talk.tell(has('n', 1, gpu=1))) == [high]


def test_a_request_for_more_is_not_overtaken_by_those_for_less():
    talk, first, many, one = Talk(), job(resources=GPU), job(resources=GPUS), job(resources=GPU)
    talk.tell(has('n', 4, gpu=2))
    assert sent(talk.submit([first, many, one])) == [first]
    assert sent(talk.results('n', [first])) == [many]
    assert sent(talk.results('n', [many])) == [one]


def test_a_job_goes_to_the_node_that_has_what_it_needs():
    talk, work = Talk(), job(resources=(('gpu', 1), ('licence', 1)))
    talk.tell(has('plain', 4), has('half', 4, gpu=4), has('both', 1, gpu=1, licence=1))
    assert sent(talk.submit([work]), 'both') == [work]


def test_memory_is_kept_for_jobs_that_say_how_much_they_use():
    talk, works = Talk(), jobs(3, memory=3 * GIB)
    talk.tell(has('n', 4, memory=8 * GIB))
    assert sent(talk.submit(works)) == works[:2]
    assert sent(talk.results('n', works[:1])) == works[2:]
    talk, works = Talk(), jobs(3, memory=3 * GIB)  # a node that does not know how much it has
    talk.tell(has('n', 4))
    assert sent(talk.submit(works)) == works


@pytest.mark.parametrize(
    'options, told',
    [({
        'resources': GPUS
    }, 'it needs 2 gpu (dispy_resources), and no node has more than 1'),
     ({
         'resources': (('licence', 1), )
     }, 'it needs 1 licence (dispy_resources), and no node has any'),
     ({
         'memory': 9 * GIB
     }, 'it needs 9663676416 bytes of memory (dispy_memory), and no node has more than 8589934592'),
     ({
         'cpus': 5,
         'resources': GPU
     }, 'it needs 5 CPUs (dispy_cpus), and no node has more than 2'),
     ({
         'memory': 8 * GIB,
         'resources': GPU
     }, 'it needs 1 CPU, 1 gpu, 8589934592 bytes of memory, and no node has all of that'),
     ({
         'node': 'large',
         'resources': GPU
     }, 'it needs 1 gpu (dispy_resources), and no node has any; it is for node large alone')])
def test_what_no_node_can_give_is_told_at_once_and_waits_for_one_that_can(options, told):
    talk, work, behind = Talk(), job(**options), job()
    talk.tell(has('small', 2, gpu=1, memory=GIB), has('large', 2, memory=8 * GIB))
    actions = talk.submit([work, behind])
    assert parked(actions) == [(work, told)] and sent(actions) == [behind]
    if 'node' in options:
        assert sent(talk.tell(has('large', 2, gpu=1)), 'large') == [work]
    else:
        assert sent(talk.tell(has('new', 8, gpu=2, licence=1, memory=16 * GIB)), 'new') == [work]


def test_a_request_waits_without_a_word_where_there_is_no_node():
    talk, work = Talk(), job(resources=GPU)
    assert not parked(talk.submit([work])) and work.state is JobState.CREATED
    talk.tell(has('n', 1))
    talk.tell(NodeAway('n', 'n', 'lost', 10.0))
    assert not parked(talk.submit([job(resources=GPU)]))


def test_what_the_first_node_cannot_give_is_told_also_to_jobs_that_stand_behind_others():
    talk, can, cannot, wide = Talk(), jobs(3, resources=GPU), job(resources=GPUS), job(cpus=3)
    cancelled = job(resources=GPUS)
    talk.submit([*can, cannot, wide, cancelled])
    talk.tell(dispy.CancelAsked(cancelled))
    actions = talk.tell(has('n', 2, gpu=1))
    assert sorted(text for _, text in parked(actions)) == [
        'it needs 2 gpu (dispy_resources), and no node has more than 1',
        'it needs 3 CPUs (dispy_cpus), and no node has more than 2']
    assert sent(actions) == can[:1]
    assert cannot in sent(talk.tell(has('m', 3, gpu=2)))
    while any(work.state is not JobState.FINISHED for work in (*can, cannot, wide)):
        for key in 'nm':
            flight = talk.schedule.nodes[key].in_flight['c']
            talk.results(key, list(flight.values()))
    assert talk.schedule.comps['c'].length() == 0


def test_a_scheduler_counts_by_itself_if_it_knows_how():
    talk = Talk()
    talk.schedule.handle(dispy.Opened('r', 'r', True, remote=True), 0.0)
    works = jobs(3, 'r', resources=GPU, memory=1 << 60)
    talk.tell(
        NodeReady('s',
                  'r',
                  1 << 20, [],
                  stock=dispy.stock_of({
                      'role': 'scheduler',
                      'resources': {}
                  })))
    assert sent(talk.submit(works)) == works
    old = Talk()
    old.schedule.handle(dispy.Opened('r', 'r', True, remote=True), 0.0)
    old.tell(NodeReady('s', 'r', 1 << 20, [], stock=dispy.stock_of({'role': 'scheduler'})))
    (work, told), = parked(old.submit([job('r', resources=GPU)]))
    assert 'of an earlier release' in told and 'update the scheduler' in told
    assert sent(old.submit(jobs(1, 'r',
                                memory=1 << 60)))  # which that release limits, and does not count


def test_what_waits_for_resources_can_be_cancelled_and_ends_with_its_computation():
    talk, works = Talk(), jobs(4, resources=GPU)
    talk.tell(has('n', 4, gpu=1))
    talk.submit(works)
    talk.tell(dispy.CancelAsked(works[2]))
    assert works[2].state is JobState.CANCELLED
    assert sent(talk.results('n', works[:1])) == [works[1]]
    assert sent(talk.results('n', works[1:2])) == [works[3]]
    talk.tell(dispy.Closed('c'))
    assert works[3].state is JobState.CANCELLED and talk.schedule.nodes['n'].stock.used['gpu'] == 0


NEEDS = ({}, {'resources': GPU}, {'resources': GPUS}, {'resources': (('gpu', 1), ('licence', 1))},
         {'memory': GIB}, {'cpus': 2, 'memory': 2 * GIB}, {'priority': 1, 'resources': GPU},
         {'node': 1, 'resources': GPU})


def check_counts(talk):
    """What jobs at a node take is counted, and never more than there is."""
    for node in talk.schedule.nodes.values():
        taken = {'gpu': 0, 'licence': 0, 'memory': 0}
        for flight in node.in_flight.values():
            for work in flight.values():
                for name, count in dispy.needs_of(work):
                    taken[name] += count
        assert {name: node.stock.used[name] for name in taken} == taken
        for name, count in taken.items():
            assert count <= node.stock.most(name), (name, node.key)


@pytest.mark.parametrize('seed', range(20))
def test_whatever_happens_no_node_is_given_more_than_it_has(seed):
    rng, talk, works = random.Random(seed), Talk('c', 'd'), []
    stocks = {key: {'gpu': rng.randint(1, 3), 'licence': rng.randint(0, 2),
                    'memory': rng.randint(2, 4) * GIB} for key in (1, 2, 3)}

    def node_comes(key):
        for comp in ('c', 'd'):
            flight = talk.schedule.nodes[key].in_flight.get(comp, {}) \
                if key in talk.schedule.nodes else {}
            talk.tell(NodeReady(key, comp, 2, list(flight), stock=stocks[key]))

    def some_end(key):
        node = talk.schedule.nodes.get(key)
        for comp, flight in (node.in_flight if node else {}).items():
            ended = rng.sample(sorted(flight), rng.randint(0, len(flight)))
            talk.results(key, [flight[serial] for serial in ended], comp,
                         took=rng.choice((0.0001, 1.0)))

    for _ in range(120):
        key = rng.choice((1, 2, 3))
        act = rng.random()
        if act < 0.4:
            comp = rng.choice('cd')
            new = [job(comp, **rng.choice(NEEDS)) for _ in range(rng.randint(1, 5))]
            works += new
            talk.submit(new)
        elif act < 0.8:
            some_end(key)
        elif act < 0.9:
            node_comes(key)
        elif act < 0.95:
            talk.tell(NodeLost(key, str(key), 'lost'))
        elif works:
            talk.tell(dispy.CancelAsked(rng.choice(works)))
        check_counts(talk)
    stocks[3] = {'gpu': 2, 'licence': 1, 'memory': 4 * GIB}   # which has what any needs
    for key in (1, 2, 3):
        node_comes(key)
    for _ in range(2000):
        for key in (1, 2, 3):
            some_end(key)
        check_counts(talk)
        for work in works:
            if work.state is JobState.CANCELLING:
                node = talk.schedule.comps[work.comp].running[work.serial]
                talk.results(node.key, [work], work.comp, outcome=Outcome.CANCELLED)
        if all(work.state in ENDED for work in works):
            return
    left = [work.options for work in works if work.state not in ENDED]
    raise AssertionError('these jobs do not end: %s' % left)


# -- a node ----------------------------------------------------------------------------------------


def node_talk(cpus=4, **resources):
    talk = NodeTalk(cpus)
    talk.node = Node('host', cpus, {'resources': resources})
    return talk


def units(actions):
    return [(action.worker, action.units) for action in only(actions, Equip)]


def test_workers_have_units_and_jobs_that_ask_for_the_same():
    talk = node_talk(gpu=2)
    talk.ready()
    actions = talk.jobs(1, 2, 3, resources=GPU)
    assert units(actions) == [(1, {
        'gpu': [0]
    }), (2, {
        'gpu': [1]
    })] and fed(actions) == [(1, [1]), (2, [2])]
    kinds = [type(action) for action in actions if type(action) in (Equip, StartWorker)]
    assert kinds == [Equip, StartWorker] * 2
    assert fed(talk.results(2, 2)) == [(2, [3])]  # it keeps its device


def test_a_job_without_resources_does_not_get_a_worker_with_a_device():
    talk = node_talk(1, gpu=1)
    talk.ready()
    talk.results(fed(talk.jobs(1, resources=GPU))[0][0], 1)
    actions = talk.jobs(2)
    assert fed(actions) == [(2, [2])] and not units(actions) and not only(actions, Retire)
    talk.results(2, 2)
    assert fed(talk.jobs(3, resources=GPU)) == [(1, [3])]


def test_an_idle_worker_lets_go_of_its_device_for_another_and_that_waits_for_its_end():
    talk = node_talk(gpu=2)
    talk.ready()
    talk.jobs(1, 2, resources=GPU)
    talk.results(1, 1), talk.results(2, 2)
    actions = talk.jobs(3, resources=GPUS)
    assert only(actions, Retire) == [Retire(1), Retire(2)] and not fed(actions)
    assert not fed(talk.tell(WorkerLeft(1)))
    actions = talk.tell(WorkerLeft(2))
    assert units(actions) == [(3, {'gpu': [0, 1]})] and fed(actions) == [(3, [3])]


def test_another_computation_gets_the_device_of_an_idle_worker():
    talk = node_talk(gpu=1)
    talk.ready(), talk.ready('d')
    talk.results(fed(talk.jobs(1, resources=GPU))[0][0], 1)
    assert only(talk.jobs(9, comp='d', resources=GPU), Retire) == [Retire(1)]
    assert fed(talk.tell(WorkerLeft(1))) == [(2, [9])]


def test_a_worker_that_dies_gives_its_device_back():
    talk = node_talk(gpu=1)
    talk.ready()
    talk.jobs(1, 2, resources=GPU)
    actions = talk.tell(WorkerGone(1, 'killed', 1))
    assert rows(actions) == [(1, Outcome.DIED)] and units(actions) == [(2, {
        'gpu': [0]
    })] and fed(actions) == [(2, [2])]


def test_idle_workers_with_devices_end_after_a_while():
    talk = node_talk(gpu=1)
    talk.ready()
    talk.results(fed(talk.jobs(1, resources=GPU))[0][0], 1)
    assert only(talk.after(300.0), Retire) == [Retire(1)]


def test_a_worker_with_an_initializer_has_its_device_before_that():
    talk = node_talk(gpu=1)
    talk.ready(initializer=True)
    actions = talk.jobs(1, 2, resources=GPU)
    assert units(actions) == [(1, {'gpu': [0]})] and not fed(actions)
    assert fed(talk.tell(WorkerInitialized(1, ''))) == [(1, [1])]


def test_what_the_node_has_not_is_told_by_number():
    talk = node_talk(gpu=1)
    talk.ready()
    actions = talk.jobs(1, resources=GPUS)
    assert texts(actions) == {1: 'the job wants 2 gpu (dispy_resources) and node host has 1'}
    assert fed(talk.jobs(2, resources=GPU)) == [(1, [2])]


def test_whatever_happens_on_a_node_no_two_workers_have_the_same_device():
    for seed in range(30):
        walk_node(random.Random(seed))


def walk_node(rng):
    talk, holders, leaving, serials = node_talk(4, gpu=2, licence=1), {}, [], iter(range(1, 10000))
    for comp in ('c', 'd'):
        talk.ready(comp)

    def take(actions):
        for action in actions:
            if type(action) is Equip:
                for name, numbers in action.units.items():
                    for number in numbers:
                        assert (name, number) not in holders.values()
                        holders[action.worker, name, number] = name, number
            elif type(action) is Retire:
                leaving.append(action.worker)

    def free(worker):
        for key in [key for key in holders if key[0] == worker]:
            del holders[key]

    for _ in range(200):
        workers = [worker for worker in talk.node.tables.workers.values() if worker.queue]
        act = rng.random()
        if act < 0.4:
            options = rng.choice(({}, {'resources': GPU}, {'resources': GPUS},
                                  {'resources': (('gpu', 1), ('licence', 1))}))
            take(talk.jobs(next(serials), comp=rng.choice('cd'), **options))
        elif act < 0.75 and workers:
            worker = rng.choice(workers)
            take(talk.results(worker.key, worker.queue[0].serial))
        elif act < 0.8 and workers:
            worker = rng.choice(workers)
            free(worker.key)
            take(talk.tell(WorkerGone(worker.key, 'killed', worker.queue[0].serial)))
        elif leaving:
            worker = leaving.pop(rng.randrange(len(leaving)))
            free(worker)
            take(talk.tell(WorkerLeft(worker)))
    for _ in range(3000):   # all end
        for worker in leaving:
            free(worker)
            take(talk.tell(WorkerLeft(worker)))
        del leaving[:]
        busy = [worker for worker in talk.node.tables.workers.values() if worker.queue]
        for worker in busy:
            take(talk.results(worker.key, worker.queue[0].serial))
        if not busy and not leaving:
            break
    assert not any(comp.attempts for comp in talk.node.tables.comps.values())
    assert talk.node.cpus.free == 4
