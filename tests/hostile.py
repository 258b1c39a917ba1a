"""Programs that try to get out of the sandbox, for test_sandbox.py: each prints ESCAPED when it has.

They find what they are after in `T`: a victim (the pid of another process, an address in it), a file and a folder
outside, addresses to call, an empty name. `call` is a system call by number.
"""

PRELUDE = """
import os, sys, socket, errno, stat, time
T = {target!r}
def escaped(yes=True):
    if yes: os.write(1, b"ESCAPED\\n")
def call(number, *arguments):
    import ctypes
    words = [a if isinstance(a, (bytes, ctypes.Array)) else ctypes.c_long(a) for a in arguments]
    return ctypes.CDLL(None).syscall(ctypes.c_long(number), *words)
"""

# name: program. The first ones are those of the design.
PROBES = {
    "os.system": "os.system('echo ESCAPED')",
    "posix.system": "import posix; posix.system('echo ESCAPED')",
    "os, loaded again": "import importlib; importlib.reload(os).system('echo ESCAPED')",
    "posix_spawn": "pid = os.posix_spawn('/bin/sh', ['sh', '-c', 'echo ESCAPED'], {}); os.waitpid(pid, 0)",
    "execv": "os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
    "ctypes": "import ctypes; ctypes.CDLL(None).system(b'echo ESCAPED')",
    "the parent's environment": "escaped(open(f'/proc/{os.getppid()}/environ').read())",
    "writing outside": "open(T['folder'] + '/new', 'w').write('x'); escaped()",
    "/etc/passwd": "escaped(open('/etc/passwd').read())",
    "TCP to this machine": "socket.create_connection(('127.0.0.1', T['tcp']), 2); escaped()",
    "TCP to another": "socket.socket(); escaped()",
    "UDP": "s = socket.socket(type=socket.SOCK_DGRAM); escaped(s.sendto(b'x', ('127.0.0.1', T['udp'])))",
    "an abstract socket": "socket.socket(socket.AF_UNIX).connect(T['abstract']); escaped()",
    "a signal to the parent": "os.kill(os.getppid(), 18); escaped()",
    "fork and setsid": """
if os.fork() == 0:
    os.setsid(); escaped(); os._exit(0)
os.wait()""",
    "1 GiB of memory": "x = bytearray(2**30); escaped()",
    "a file of 20 MB": "open('big', 'wb').write(bytes(20_000_000)); escaped()",
    # other processes
    "a signal to another": "os.kill(T['victim'], 18); escaped()",
    "a signal to all of a group": "os.killpg(os.getpgid(T['victim']), 18); escaped()",
    "a signal through a pidfd": "import signal; signal.pidfd_send_signal(os.pidfd_open(T['victim']), 18); escaped()",
    "a signal by F_SETOWN": "import fcntl; fcntl.fcntl(1, fcntl.F_SETOWN, T['victim']); escaped()",
    "a signal queued": "escaped(call(129, T['victim'], 18, (18).to_bytes(8, 'little') + (-1 & 0xFFFFFFFF)"
    ".to_bytes(8, 'little') + bytes(112)) == 0)",
    "ptrace": """
import ctypes
libc = ctypes.CDLL(None)
libc.ptrace.argtypes = [ctypes.c_long] * 4
escaped(libc.ptrace(0x4206, T['victim'], 0, 0) == 0)  # SEIZE: it is let go when we end""",
    "another's memory": "f = open(f'/proc/{T[\"victim\"]}/mem', 'rb'); f.seek(T['address']); escaped(f.read(8))",
    "its memory by process_vm_readv": """
import ctypes
room = ctypes.create_string_buffer(8)
class V(ctypes.Structure): _fields_ = [('at', ctypes.c_void_p), ('n', ctypes.c_size_t)]
ours, theirs = V(ctypes.addressof(room), 8), V(T['address'], 8)
by = lambda v: ctypes.c_void_p(ctypes.addressof(v))
escaped(ctypes.CDLL(None).process_vm_readv(T['victim'], by(ours), 1, by(theirs), 1, 0) == 8)""",
    "its descriptors by pidfd_getfd": "escaped(call(438, os.pidfd_open(T['victim']), 0, 0) >= 0)",
    "its descriptors in /proc": "escaped(os.listdir(f'/proc/{T[\"victim\"]}/fd'))",
    "its pipes": "escaped(os.open(f'/proc/{T[\"victim\"]}/fd/0', os.O_RDONLY | os.O_NONBLOCK) >= 0)",
    "its command line": "escaped(open(f'/proc/{T[\"victim\"]}/cmdline').read())",
    "its executable": "escaped(os.readlink(f'/proc/{T[\"victim\"]}/exe'))",
    "its limits": "import resource; resource.prlimit(T['victim'], resource.RLIMIT_CORE, (0, 0)); escaped()",
    "its priority": "os.setpriority(os.PRIO_PROCESS, T['victim'], 1); escaped()",
    "its cores": "os.sched_setaffinity(T['victim'], os.sched_getaffinity(T['victim'])); escaped()",
    "its scheduling": "os.sched_setscheduler(T['victim'], os.SCHED_OTHER, os.sched_param(0)); escaped()",
    "comparing processes": "escaped(call(312, os.getpid(), os.getppid(), 1, 0, 0) >= 0)",
    "the list of processes": "escaped([name for name in os.listdir('/proc') if name.isdigit()])",
    "/proc/self/mem": "escaped(open('/proc/self/mem', 'rb'))",
    "vfork": "import ctypes; pid = ctypes.CDLL(None).fork(); escaped(pid == 0); pid or os._exit(0)",
    "clone by number": "pid = call(56, 17, 0, 0, 0, 0); escaped(pid == 0); pid or os._exit(0)",
    "clone3 by number": "pid = call(435, (17).to_bytes(40, 'little')[8:40].rjust(88, b'\\0')[:32] + (17).to_bytes(8, "
    "'little') + bytes(48), 88); escaped(pid == 0); pid or os._exit(0)",
    "a thread": "import threading; threading.Thread(target=escaped).start(); time.sleep(0.1)",
    "a process pool": "from multiprocessing import Process; p = Process(target=escaped); p.start(); p.join()",
    "a program without a file": """
fd = os.memfd_create('x', 0)
os.write(fd, open(T['program'], 'rb').read())
os.execve(fd, ['echo', 'ESCAPED'], {})""",
    "a program of its own": """
open('own', 'wb').write(open('/bin/sh', 'rb').read()); os.chmod('own', 0o755)
os.execv('own', ['sh', '-c', 'echo ESCAPED'])""",
    # files
    "a file outside": "escaped(open(T['file']).read())",
    "a listing of /": "escaped(os.listdir('/'))",
    "a listing of the temporary folder": "escaped(os.listdir(os.path.dirname(T['folder'])))",
    "out by ..": "escaped(os.listdir('..'))",
    "emptying a file": "os.truncate(T['file'], 0); escaped()",
    "emptying a file while opening it": "os.open(T['file'], os.O_RDONLY | os.O_TRUNC); escaped()",
    "appending to a file": "open(T['file'], 'a').write('x'); escaped()",
    "removing a file": "os.unlink(T['file']); escaped()",
    "a file without a name": "fd = os.open('.', os.O_TMPFILE | os.O_RDWR); escaped(os.write(fd, b'x'))",
    "a file that loses its name": "open('mine', 'w').close(); os.unlink('mine'); escaped()",
    "a file whose name another takes": "open('a', 'w').close(); open('b', 'w').close(); os.rename('a', 'b'); escaped()",
    "a folder outside": "os.mkdir(T['folder'] + '/new'); escaped()",
    "removing a folder": "os.rmdir(T['folder'] + '/empty'); escaped()",
    "moving a file in": "os.rename(T['file'], 'mine'); escaped()",
    "moving a file out": "open('mine', 'w').close(); os.rename('mine', T['folder'] + '/theirs'); escaped()",
    "a hard link in": "os.link(T['file'], 'mine'); escaped(open('mine').read())",
    "a symbolic link": "os.symlink(T['file'], 'mine'); escaped(open('mine').read())",
    "rights of a file": "os.chmod(T['file'], 0o777); escaped()",
    "rights through a descriptor": "os.fchmod(os.open(T['file'], os.O_PATH), 0o777) if 0 else os.chmod('.', 0o777);"
    "escaped()",
    "owner of a file": "os.chown(T['file'], os.getuid(), os.getgid()); escaped()",
    "times of a file": "os.utime(T['file'], (1, 1)); escaped()",
    "attributes of a file": "os.setxattr(T['file'], 'user.x', b'x'); escaped()",
    "a link's target": "escaped(os.readlink(T['folder'] + '/link'))",
    "watching a folder": "fd = call(253); escaped(fd >= 0 and call(254, fd, T['folder'].encode(), 4095) >= 0)",
    "a file by handle": "escaped(call(303, -100, T['file'].encode(), (128).to_bytes(4, 'little') + bytes(132), "
    "bytes(8), 0) == 0)",
    "a lock on a file": "import fcntl; fcntl.flock(os.open(T['file'], os.O_RDONLY), 2); escaped()",
    "a device": "escaped(open('/dev/zero', 'rb').read(1))",
    "the terminal": "escaped(open('/dev/tty') if 0 else open('/dev/full'))",
    "shared memory's folder": "open('/dev/shm/' + T['name'], 'w'); escaped(); os.unlink('/dev/shm/' + T['name'])",
    "a pipe with a name": "os.mkfifo('pipe'); escaped()",
    "another working folder": "os.chdir(T['folder']); escaped()",
    "folders without end": """
for _ in range(3000):
    os.mkdir('d'); os.chdir('d')
escaped()""",
    "a file of the library": "open(os.path.join(os.path.dirname(os.__file__), T['name']), 'w'); escaped();"
    "os.unlink(os.path.join(os.path.dirname(os.__file__), T['name']))",
    # sockets and what else reaches others
    "a socket with a name": "socket.socket(socket.AF_UNIX).connect(T['unix']); escaped()",
    "a server": "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); escaped()",
    "a pair of sockets": "socket.socketpair(); escaped()",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); escaped()",
    "the host by vsock": "socket.socket(socket.AF_VSOCK); escaped()",
    "a name server": "socket.getaddrinfo('127.0.0.1', 80, socket.AF_INET, socket.SOCK_STREAM);"
    "socket.create_connection(('127.0.0.1', T['tcp']), 2); escaped()",
    "shared memory": "i = call(29, 0, 4096, 0o1600); escaped(i >= 0); call(31, i, 0, 0)",
    "a message queue": "i = call(68, 0, 0o1600); escaped(i >= 0); call(71, i, 0, 0)",
    "semaphores": "i = call(64, 0, 1, 0o1600); escaped(i >= 0); call(66, i, 0, 0)",
    "a POSIX queue": "i = call(240, T['name'].encode(), 0o102, 0o600, 0); escaped(i >= 0);"
    "call(241, T['name'].encode())",
    "a key": "escaped(call(248, b'user\\0', b'x\\0', b'y', 1, -2) >= 0)",
    "pipes": "os.pipe(); escaped()",
    # the kernel
    "io_uring": "escaped(call(425, 4, bytes(120)) >= 0)",
    "BPF": "escaped(call(321, 0, (2).to_bytes(4, 'little') + (4).to_bytes(4, 'little') * 2 + "
    "(1).to_bytes(4, 'little') + bytes(100), 72) >= 0)",
    "page faults": "escaped(call(323, 1) >= 0)",
    "performance events": "escaped(call(298, (1).to_bytes(4, 'little') + (112).to_bytes(4, 'little') + bytes(104), "
    "0, -1, -1, 0) >= 0)",
    "a namespace": "escaped(call(272, 0x10000000) == 0)",
    "a namespace of another": "escaped(call(308, os.open('/proc/self/ns/uts', 0), 0) == 0)",
    "a mount": "escaped(call(165, b'none\\0', T['folder'].encode() + b'/empty\\0', b'tmpfs\\0', 0, 0) == 0);"
    "call(166, T['folder'].encode() + b'/empty\\0', 2)",
    "another root": "os.chroot(T['folder']); escaped()",
    "a device file": "os.mknod('null', stat.S_IFCHR | 0o666, os.makedev(1, 3)); escaped(open('null').read() == '')",
    "the host's name": "socket.sethostname(socket.gethostname()); escaped()",
    "the clock": "time.clock_settime(time.CLOCK_REALTIME, time.time()); escaped()",
    "other rlimits": "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**40, 2**40)); escaped()",
    "another user": "os.setuid(12345); escaped()",
    "other groups": "os.setgroups([12345]); escaped()",
    "a session of its own": "os.setpgid(0, 0) if os.getsid(0) != os.getpid() else os.setpgid(0, os.getppid());"
    "escaped()",
    "a filter of its own": "import ctypes; n = ctypes.c_uint(); escaped(call(317, 2, 0, "
    "(0x7fff0000).to_bytes(4, 'little')) == 0)",
    "being traced by all": "import ctypes; escaped(ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(2**64 - 1), 0, 0,"
    " 0) == 0 or ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0)",
    "another personality": "escaped(call(135, 0xFFFFFFFF) >= 0)",
    "32-bit calls": """
import ctypes, mmap
code = bytes([0x53, 0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0x5B, 0xC3])  # push rbx; mov eax, 20 (getpid); int 0x80; pop; ret
room = mmap.mmap(-1, 4096, prot=7)
room.write(code)
at = ctypes.addressof(ctypes.c_char.from_buffer(room))
escaped(ctypes.CFUNCTYPE(ctypes.c_int)(at)() == os.getpid())""",
    # kinds that were thought of without knowing how the sandbox works
    "memory outside its address space": "fd = os.memfd_create('x', 0)\n"
    "escaped(sum(os.write(fd, bytes(1 << 20)) for _ in range(600)) > 512 << 20)",
    "a call by x32's number": "escaped(call(0x40000000 | 39) > 0)",
    "a number with a high half": "pid = call(1 << 32 | 57); escaped(pid >= 0); pid or os._exit(0)",
    "openat2": "escaped(call(437, -100, T['file'].encode(), bytes(24), 24) >= 0)",
    "a path opened again": "fd = os.open(T['file'], os.O_PATH); escaped(open(f'/proc/self/fd/{fd}').read())",
    "through its root in /proc": "escaped(open('/proc/self/root' + T['file']).read())",
    "a tree of mounts": "escaped(call(428, -100, T['folder'].encode(), 1) >= 0)",
    "a file system": "escaped(call(430, b'tmpfs', 0) >= 0)",
    "watching all files": "escaped(call(300, 0, 0) >= 0)",
    "the list of mounts": "escaped(open('/proc/self/mountinfo').read())",
    "its own addresses": "escaped(open('/proc/self/maps').read())",
    "the machine in /sys": "escaped(os.listdir('/sys'))",
    "what the next Python would load": "import sysconfig\n"
    "at = os.path.join(sysconfig.get_paths()['purelib'], T['name'] + '.pth'); open(at, 'w'); escaped(); os.unlink(at)",
    "a signal to a thread": "escaped(call(234, T['victim'], T['victim'], 18) == 0)",
    "living on without its parent": "import ctypes; escaped(ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0)",
    "being told of changes in a folder": "import fcntl; fcntl.fcntl(os.open(T['folder'], 0), fcntl.F_NOTIFY, 2);"
    "escaped()",
    "another's robust list": "import ctypes; a = ctypes.create_string_buffer(8); b = ctypes.create_string_buffer(8)\n"
    "escaped(call(274, T['victim'], a, b) == 0)",
    "another's I/O priority": "escaped(call(251, 1, T['victim'], 2 << 13 | 7) == 0)",
    "the kernel's log": "import ctypes; escaped(call(103, 3, ctypes.create_string_buffer(4096), 4096) > 0)",
    "asynchronous files": "import ctypes; escaped(call(206, 8, ctypes.create_string_buffer(8)) == 0)",
    "real time": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)); escaped()",
    "memory that is never swapped": "import mmap; m = mmap.mmap(-1, 1 << 20); import ctypes\n"
    "escaped(call(149, ctypes.addressof(ctypes.c_char.from_buffer(m)), 1 << 20) == 0)",
    "the last to be killed for memory": "escaped(open('/proc/self/oom_score_adj', 'w').write('-1'))",
    "the kernel's ciphers": "socket.socket(38, socket.SOCK_SEQPACKET, 0); escaped()",
    "raw packets": "socket.socket(17, socket.SOCK_RAW, 0); escaped()",
    "kernel objects without end": "escaped(call(290, 0, 0) >= 0 and call(291, 0) >= 0 and call(283, 1, 0) >= 0)",
}
# Which do nothing as another user than root, even without a sandbox; and which are not tried without one.
AS_ROOT = {"a mount", "another root", "a device file", "the host's name", "other rlimits", "another user",
           "other groups", "performance events", "a namespace of another", "BPF", "a file of the library",
           "a tree of mounts", "a file system", "watching all files", "the kernel's log", "real time",
           "the last to be killed for memory", "raw packets"}  # fmt: skip
UNPROVEN = {
    "the clock": "it would set this machine's",
    "a file of the library": "it would change this Python's",
    "what the next Python would load": "it would change this Python's",
    "a call by x32's number": "whether the kernel has them is a matter of its configuration",
    "the kernel's ciphers": "whether the kernel has them is a matter of its configuration",
    "folders without end": "who would remove them?",
    "page faults": "whether the kernel has it is a matter of its configuration",
    "io_uring": "whether the kernel has it is a matter of its configuration",
    "a key": "whether the kernel has it is a matter of its configuration",
    "a POSIX queue": "whether the kernel has it is a matter of its configuration",
    "BPF": "whether the kernel has it is a matter of its configuration",
    "32-bit calls": "whether the kernel has them is a matter of its configuration",
    "comparing processes": "whether the kernel has it is a matter of its configuration",
    "a session of its own": "the process that starts it decides",
    "the host by vsock": "whether the kernel has it is a matter of its configuration",
}
