// Preloaded: the wall clock jumps, as if somebody set it, ten times a second: by an hour ahead each time, or by an hour
// back where KVT_SHIM_CLOCK is "back". When is a matter of the monotonic clock, that stays as it is: so all processes
// see the same clock, and nobody has to be told.
//
// Waits until a time of the wall clock wait for that clock: ahead they end early, back they never end, as they would
// if it were set. Which clock a pthread_cond_timedwait means isn't in its arguments; its time tells: the monotonic
// clock counts from the start of the machine, and the wall clock is beyond 2001.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>

static const int64_t SECOND = 1000000000, STEP = 100000000, WALL_FROM = 1000000000;
static const int64_t STEPS = 1000;  // then it is as it was: it must not leave our century
static int64_t jump = 3600;

static int (*real_clock_gettime)(clockid_t, struct timespec *);
static int (*real_cond_timedwait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
static int (*real_cond_clockwait)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
static int (*real_sem_clockwait)(sem_t *, clockid_t, const struct timespec *);

__attribute__((constructor)) static void begin(void) {
    *(void **)&real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    *(void **)&real_cond_timedwait = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    *(void **)&real_cond_clockwait = dlsym(RTLD_NEXT, "pthread_cond_clockwait");
    *(void **)&real_sem_clockwait = dlsym(RTLD_NEXT, "sem_clockwait");
    const char *direction = getenv("KVT_SHIM_CLOCK");
    if (direction != NULL && strcmp(direction, "back") == 0) {
        jump = -3600;
    }
}

static int64_t to_ns(const struct timespec *at) { return at->tv_sec * SECOND + at->tv_nsec; }

static struct timespec from_ns(int64_t ns) { return (struct timespec){ns / SECOND, ns % SECOND}; }

static int64_t real_ns(clockid_t clock) {
    struct timespec at;
    if (real_clock_gettime == NULL) {  // another library's constructor was first
        begin();
    }
    real_clock_gettime(clock, &at);
    return to_ns(&at);
}

static int64_t wall_ns(void) {
    const int64_t step = real_ns(CLOCK_MONOTONIC) / STEP;
    return real_ns(CLOCK_REALTIME) + step % STEPS * jump * SECOND;
}

static int is_wall(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

int clock_gettime(clockid_t clock, struct timespec *at) {
    if (is_wall(clock)) {
        *at = from_ns(wall_ns());
        return 0;
    }
    if (real_clock_gettime == NULL) {
        begin();
    }
    return real_clock_gettime(clock, at);
}

int gettimeofday(struct timeval *at, void *zone) {
    (void)zone;
    const struct timespec now = from_ns(wall_ns());
    *at = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
    return 0;
}

time_t time(time_t *at) {
    const time_t now = wall_ns() / SECOND;
    if (at != NULL) {
        *at = now;
    }
    return now;
}

// ---- waits

// Says until when by the monotonic clock a wait may last before the wall clock must be looked at again; 0: it is over.
static struct timespec look_again(const struct timespec *until) {
    const int64_t left = to_ns(until) - wall_ns(), now = real_ns(CLOCK_MONOTONIC);
    const int64_t next_step = (now / STEP + 1) * STEP;
    if (left <= 0) {
        return (struct timespec){0, 0};
    }
    return from_ns(now + left < next_step ? now + left : next_step);
}

static int wait_by_wall_clock(pthread_cond_t *cond, pthread_mutex_t *mutex, const struct timespec *until) {
    for (;;) {
        const struct timespec next = look_again(until);
        if (to_ns(&next) == 0) {
            return ETIMEDOUT;
        }
        const int result = real_cond_clockwait(cond, mutex, CLOCK_MONOTONIC, &next);
        if (result != ETIMEDOUT) {
            return result;
        }
    }
}

int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex, const struct timespec *until) {
    if (until->tv_sec < WALL_FROM) {
        return real_cond_timedwait(cond, mutex, until);
    }
    return wait_by_wall_clock(cond, mutex, until);
}

int pthread_cond_clockwait(pthread_cond_t *cond, pthread_mutex_t *mutex, clockid_t clock,
                           const struct timespec *until) {
    if (!is_wall(clock)) {
        return real_cond_clockwait(cond, mutex, clock, until);
    }
    return wait_by_wall_clock(cond, mutex, until);
}

int sem_clockwait(sem_t *semaphore, clockid_t clock, const struct timespec *until) {
    if (!is_wall(clock)) {
        return real_sem_clockwait(semaphore, clock, until);
    }
    for (;;) {
        const struct timespec next = look_again(until);
        if (to_ns(&next) == 0) {
            errno = ETIMEDOUT;
            return -1;
        }
        const int result = real_sem_clockwait(semaphore, CLOCK_MONOTONIC, &next);
        if (result == 0 || errno != ETIMEDOUT) {
            return result;
        }
    }
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    return sem_clockwait(semaphore, CLOCK_REALTIME, until);
}
