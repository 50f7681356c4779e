"""Where the secret comes from, how its file is made and refused, and the errors of certificates."""

import logging
import os
import stat
import threading

import pytest

import dispynode
from dispynode import SecretError, derive_key, find_secret, secret_path, tls_context

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='modes of files are POSIX')


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty configuration directory, and no secret in the environment."""
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path))
    monkeypatch.delenv('DISPY_SECRET')
    derive_key.cache_clear()
    return tmp_path


def write(path, data=b'a secret of some length\n', mode=0o600):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


def test_the_first_source_wins(home, monkeypatch):
    path = write(home / 'given', b'from the path')
    write(home / 'dispy' / 'secret', b'from home')
    assert find_secret() == b'from home'
    monkeypatch.setenv('DISPY_SECRET', 'from the environment')
    assert find_secret() == b'from the environment'
    assert find_secret(path=path) == b'from the path'
    assert find_secret('from the argument', path) == b'from the argument'
    assert find_secret(b'bytes', path) == b'bytes'


def test_empty_sources_are_passed_over(home, monkeypatch):
    monkeypatch.setenv('DISPY_SECRET', '')
    write(home / 'dispy' / 'secret', b'from home')
    assert find_secret('', '') == b'from home'


# Guards against: a secret of blanks is stripped to nothing later, and everybody knows that one.
@pytest.mark.parametrize('blank', [' ', '\n', ' \t\r\n', b'  '], ids=repr)
def test_a_blank_secret_is_refused(blank):
    with pytest.raises(SecretError):
        derive_key(find_secret(blank))


# Guards against: the same from the environment, where a failed substitution leaves such values.
@pytest.mark.parametrize('wrong', (5, True, ['a']))
def test_a_secret_of_another_type_is_refused(wrong):
    with pytest.raises(TypeError, match='secret must be str or bytes, not '):
        find_secret(wrong)


def test_a_blank_environment_is_refused(monkeypatch):
    monkeypatch.setenv('DISPY_SECRET', '  ')
    with pytest.raises(SecretError):
        find_secret()


def test_the_usual_place(home, monkeypatch):
    assert secret_path() == str(home / 'dispy' / 'secret')
    monkeypatch.delenv('XDG_CONFIG_HOME')
    monkeypatch.setenv('HOME', str(home))
    assert secret_path() == str(home / '.config' / 'dispy' / 'secret')


def test_the_file_is_made_once(home):
    first = find_secret()
    assert len(first) == 64 and not first.strip(b'0123456789abcdef')
    assert find_secret() == first
    status = os.stat(secret_path())
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(secret_path())).st_mode) == 0o700
    assert os.listdir(os.path.dirname(secret_path())) == ['secret']


def test_the_mode_does_not_depend_on_the_umask(home):
    before = os.umask(0)
    try:
        find_secret()
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(secret_path()).st_mode) == 0o600


def test_two_homes_have_different_secrets(home, monkeypatch):
    first = find_secret()
    monkeypatch.setenv('XDG_CONFIG_HOME', str(home / 'other'))
    assert find_secret() != first


def test_threads_that_make_it_at_once_get_the_same(home):
    found, together = [], threading.Barrier(8)

    def find():
        together.wait(10)
        found.append(find_secret())
    threads = [threading.Thread(target=find) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 8 and len(set(found)) == 1
    assert os.listdir(os.path.dirname(secret_path())) == ['secret']


def test_the_loser_of_a_race_uses_the_winners(home, monkeypatch):
    link = os.link

    def overtaken(source, target):
        write(home / 'dispy' / 'secret', b'the winner')
        link(source, target)
    monkeypatch.setattr(os, 'link', overtaken)
    assert find_secret() == b'the winner'
    assert os.listdir(str(home / 'dispy')) == ['secret']


# Guards against: the temporary file stays behind when it cannot be written (no room on the disk).
def test_nothing_is_left_when_the_file_cannot_be_written(home, monkeypatch):
    def full(_size):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'urandom', full)
    with pytest.raises(SecretError, match='No space left'):
        find_secret()
    assert os.listdir(str(home / 'dispy')) == []


def test_a_place_that_cannot_be_used_is_named(home):
    (home / 'dispy').write_text('a file where the directory would be')
    with pytest.raises(SecretError) as info:
        find_secret()
    assert str(home / 'dispy' / 'secret') in str(info.value) and 'DISPY_SECRET' in str(info.value)


@pytest.mark.parametrize('mode',
                         [0o640, 0o604, 0o660, 0o620, 0o602, 0o644, 0o666, 0o777, 0o610, 0o601])
def test_a_file_that_others_can_reach_is_refused(home, mode):
    path = write(home / 'secret', mode=mode)
    with pytest.raises(SecretError) as info:
        find_secret(path=path)
    assert 'chmod 600 ' + path in str(info.value) and '%03o' % mode in str(info.value)


@pytest.mark.parametrize('mode', [0o600, 0o400, 0o700])
def test_a_file_of_the_owner_alone_is_used(home, mode):
    assert find_secret(path=write(home / 'secret', mode=mode)) == b'a secret of some length'


@pytest.mark.parametrize('data', [b'', b'\n', b' \t\n'], ids=repr)
def test_an_empty_file_is_refused(home, data):
    path = write(home / 'secret', data)
    with pytest.raises(SecretError, match='is empty') as info:
        find_secret(path=path)
    assert path in str(info.value)


def test_a_missing_file_is_named_and_not_made(home):
    path = str(home / 'nowhere')
    with pytest.raises(SecretError, match='cannot be read') as info:
        find_secret(path=path)
    assert path in str(info.value) and not os.path.exists(path)


def test_a_directory_is_refused(home):
    with pytest.raises(SecretError, match='cannot be read'):
        find_secret(path=str(home))


def test_no_error_tells_the_secret(home):
    path = write(home / 'secret', b'the very secret', 0o644)
    with pytest.raises(SecretError) as info:
        find_secret(path=path)
    assert 'the very secret' not in str(info.value)


def test_a_secret_error_is_a_value_error():
    assert issubclass(SecretError, ValueError) and issubclass(SecretError, dispynode.DispyError)


# -- the key ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('text', ['correct horse battery staple', 'f0' * 32,
                                  'caf\u00e9 au lait, s\u00b4il vous pla\u00eet'])
@pytest.mark.parametrize('end', [b'\n', b'\r\n', b'', b' \n'], ids=repr)
def test_text_and_file_give_the_same_key(home, text, end):
    path = write(home / 'secret', text.encode('utf-8') + end)
    assert (derive_key(find_secret(text)) == derive_key(find_secret(path=path))
            == derive_key(text.encode('utf-8') + end))


def test_keys_are_these():
    """Clients and nodes of different versions must agree on them."""
    assert (derive_key(b'0123456789abcdef' * 4).hex()
            == 'c3a448ae6b62148dd84933a24b265582230c1ee35697d6a2faba216d1782945f')
    assert (derive_key(b'correct horse battery staple').hex()
            == '20354e8a4419c4597b2d176f6b9ead599014ce4fd484245a98c3174c3c184f02')


def test_a_key_has_256_bits_and_is_its_own():
    keys = {derive_key(secret)
            for secret in (b'a' * 64, b'a' * 63, b'A' * 64, b'a long secret', b'another secret')}
    assert len(keys) == 5 and {len(key) for key in keys} == {32}


def test_a_short_secret_is_warned_of_and_not_told(caplog):
    caplog.set_level(logging.WARNING, 'dispynode')
    derive_key(b'hunter2')
    assert 'short' in caplog.text and 'hunter2' not in caplog.text


@pytest.mark.parametrize('secret', [b'0' * 64, b'twelve bytes'], ids=repr)
def test_other_secrets_are_not_warned_of(secret, caplog):
    caplog.set_level(logging.WARNING, 'dispynode')
    derive_key(secret)
    assert caplog.text == ''


# -- certificates: those that work are tried in test_handshake -------------------------------------

@pytest.mark.parametrize('server', [True, False])
def test_a_missing_certificate_is_named(home, server):
    path = str(home / 'node.crt')
    with pytest.raises(SecretError) as info:
        tls_context(server, path)
    assert path in str(info.value)


def test_what_is_no_certificate_is_named(home):
    path = write(home / 'node.crt', b'no certificate')
    with pytest.raises(SecretError) as info:
        tls_context(True, path, str(home / 'node.key'))
    assert path in str(info.value) and str(home / 'node.key') in str(info.value)
