// Preloaded: TCP sockets do at random what the kernel may do at any time, and on loopback seldom does. recv,
// recvmsg, send and sendmsg that wouldn't block move less than was asked, are interrupted (EINTR) or would block
// (EAGAIN); accept4 is interrupted. Each thread has its own sequence from KVT_SHIM_SEED.
//
// Nothing is injected that no kernel could do. An edge-triggered epoll promises an edge for whatever comes after a
// short read or an EAGAIN. Here "comes after" means: what this shim has kept back comes now, so the edge is made, by
// setting the descriptor's events again (EPOLL_CTL_MOD looks at the readiness anew). For a level-triggered wait
// nothing has to be done. Calls that may block are left alone: for them EAGAIN would be a lie.
//
// What was done is counted in the file KVT_SHIM_COUNTS, that all processes of a test share: 4 calls of 4 numbers,
// accept4's, and the edges.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum call { CALL_RECV, CALL_RECVMSG, CALL_SEND, CALL_SENDMSG, CALLS };
enum deed { WHOLE, SHORT, INTERRUPTED, AGAIN, DEEDS };
enum { MOST_FDS = 4096, MOST_IOV = 1024, TINY = 100 };

struct counts {
    _Atomic uint64_t done[CALLS][DEEDS];
    _Atomic uint64_t accepts_interrupted;
    _Atomic uint64_t edges;
};

static struct counts nowhere, *counts = &nowhere;
static uint64_t seed = 1;

static ssize_t (*real_recv)(int, void *, size_t, int);
static ssize_t (*real_recvmsg)(int, struct msghdr *, int);
static ssize_t (*real_send)(int, const void *, size_t, int);
static ssize_t (*real_sendmsg)(int, const struct msghdr *, int);
static int (*real_accept4)(int, struct sockaddr *, socklen_t *, int);
static int (*real_epoll_ctl)(int, int, int, struct epoll_event *);

__attribute__((constructor)) static void begin(void) {
    *(void **)&real_recv = dlsym(RTLD_NEXT, "recv");
    *(void **)&real_recvmsg = dlsym(RTLD_NEXT, "recvmsg");
    *(void **)&real_send = dlsym(RTLD_NEXT, "send");
    *(void **)&real_sendmsg = dlsym(RTLD_NEXT, "sendmsg");
    *(void **)&real_accept4 = dlsym(RTLD_NEXT, "accept4");
    *(void **)&real_epoll_ctl = dlsym(RTLD_NEXT, "epoll_ctl");
    const char *number = getenv("KVT_SHIM_SEED"), *path = getenv("KVT_SHIM_COUNTS");
    if (number != NULL) {
        seed = strtoull(number, NULL, 10);
    }
    const int fd = path == NULL ? -1 : open(path, O_RDWR | O_CLOEXEC);
    if (fd >= 0) {
        void *at = mmap(NULL, sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
        if (at != MAP_FAILED) {
            counts = at;
        }
    }
}

// xorshift64*
static uint64_t next_random(void) {
    static _Atomic uint64_t threads;
    static _Thread_local uint64_t state;
    if (state == 0) {
        state = (seed + ++threads) * 0x9e3779b97f4a7c15u | 1;
    }
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (state * 0x2545f4914f6cdd1du) >> 16;
}

// ---- the edges

static struct {
    int epoll;
    struct epoll_event event;
} waits[MOST_FDS];
static pthread_mutex_t waits_mutex = PTHREAD_MUTEX_INITIALIZER;

int epoll_ctl(int epoll, int op, int fd, struct epoll_event *event) {
    pthread_mutex_lock(&waits_mutex);
    const int result = real_epoll_ctl(epoll, op, fd, event);
    const int error = errno;
    if (fd >= 0 && fd < MOST_FDS && result == 0) {
        waits[fd].epoll = epoll;
        waits[fd].event = op == EPOLL_CTL_DEL ? (struct epoll_event){0} : *event;
    }
    pthread_mutex_unlock(&waits_mutex);
    errno = error;
    return result;
}

static void make_edge(int fd) {
    pthread_mutex_lock(&waits_mutex);
    if ((waits[fd].event.events & EPOLLET) != 0 &&
        real_epoll_ctl(waits[fd].epoll, EPOLL_CTL_MOD, fd, &waits[fd].event) == 0) {
        ++counts->edges;
    }
    pthread_mutex_unlock(&waits_mutex);
}

// ---- what happens to a call

static int is_ours(int fd, int flags) {
    int domain = 0, type = 0;
    socklen_t size = sizeof domain;
    if (fd < 0 || fd >= MOST_FDS || (flags & (MSG_PEEK | MSG_WAITALL)) != 0) {
        return 0;
    }
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) != 0 || domain != AF_INET) {
        return 0;
    }
    size = sizeof type;
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) != 0 || type != SOCK_STREAM) {
        return 0;
    }
    return (flags & MSG_DONTWAIT) != 0 || (fcntl(fd, F_GETFL) & O_NONBLOCK) != 0;
}

// Says how many bytes may be moved; 0: errno says what the call returns instead.
static size_t allowed(enum call call, int fd, size_t asked) {
    const uint64_t chance = next_random() % 16;
    if (chance == 0) {
        ++counts->done[call][INTERRUPTED];
        errno = EINTR;
        return 0;
    }
    if (chance == 1) {
        ++counts->done[call][AGAIN];
        make_edge(fd);
        errno = EAGAIN;
        return 0;
    }
    if (chance < 8 && asked > 1) {
        const size_t most = chance < 5 && asked > TINY ? TINY : asked - 1;
        return 1 + next_random() % most;
    }
    return asked;
}

static ssize_t moved(enum call call, int fd, ssize_t n, size_t asked, size_t cut) {
    if (n > 0) {
        ++counts->done[call][n == (ssize_t)asked ? WHOLE : SHORT];
    }
    if (n == (ssize_t)cut && cut < asked && (call == CALL_RECV || call == CALL_RECVMSG)) {
        make_edge(fd);
    }
    return n;
}

ssize_t recv(int fd, void *data, size_t size, int flags) {
    if (size == 0 || !is_ours(fd, flags)) {
        return real_recv(fd, data, size, flags);
    }
    const size_t cut = allowed(CALL_RECV, fd, size);
    return cut == 0 ? -1 : moved(CALL_RECV, fd, real_recv(fd, data, cut, flags), size, cut);
}

ssize_t send(int fd, const void *data, size_t size, int flags) {
    if (size == 0 || !is_ours(fd, flags)) {
        return real_send(fd, data, size, flags);
    }
    const size_t cut = allowed(CALL_SEND, fd, size);
    return cut == 0 ? -1 : moved(CALL_SEND, fd, real_send(fd, data, cut, flags), size, cut);
}

// The first `cut` bytes of a message, in the caller's memory.
static struct msghdr head_of(const struct msghdr *message, struct iovec *iov, size_t cut) {
    struct msghdr head = *message;
    head.msg_iov = iov;
    for (head.msg_iovlen = 0; cut > 0; ++head.msg_iovlen) {
        struct iovec *one = &iov[head.msg_iovlen];
        *one = message->msg_iov[head.msg_iovlen];
        one->iov_len = one->iov_len < cut ? one->iov_len : cut;
        cut -= one->iov_len;
    }
    return head;
}

static size_t size_of(const struct msghdr *message) {
    size_t size = 0;
    for (size_t i = 0; i < message->msg_iovlen && i < MOST_IOV; ++i) {
        size += message->msg_iov[i].iov_len;
    }
    return size;
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags) {
    const size_t size = size_of(message);
    if (size == 0 || !is_ours(fd, flags)) {
        return real_recvmsg(fd, message, flags);
    }
    const size_t cut = allowed(CALL_RECVMSG, fd, size);
    struct iovec iov[MOST_IOV];
    struct msghdr head = head_of(message, iov, cut);
    return cut == 0 ? -1 : moved(CALL_RECVMSG, fd, real_recvmsg(fd, &head, flags), size, cut);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    const size_t size = size_of(message);
    if (size == 0 || !is_ours(fd, flags)) {
        return real_sendmsg(fd, message, flags);
    }
    const size_t cut = allowed(CALL_SENDMSG, fd, size);
    struct iovec iov[MOST_IOV];
    const struct msghdr head = head_of(message, iov, cut);
    return cut == 0 ? -1 : moved(CALL_SENDMSG, fd, real_sendmsg(fd, &head, flags), size, cut);
}

int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags) {
    if (is_ours(fd, 0) && next_random() % 4 == 0) {
        ++counts->accepts_interrupted;
        errno = EINTR;
        return -1;
    }
    return real_accept4(fd, address, size, flags);
}
