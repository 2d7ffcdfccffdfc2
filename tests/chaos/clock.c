/* Adds an offset to the wall clock of a program that is started with this library in LD_PRELOAD.
   The file CHAOS_CLOCK holds the offset as a 64-bit number of seconds. Monotonic clocks stay as they are. A wait until an
   instant of the wall clock ends at this instant of the moved clock. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

typedef int (*clock_function)(clockid_t, struct timespec *);
typedef int (*wait_function)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);

static clock_function system_clock;
static wait_function system_wait;
static const volatile int64_t *offset;

__attribute__((constructor)) static void start(void) {
  system_clock = (clock_function)dlsym(RTLD_NEXT, "clock_gettime");
  /* dlsym would find the oldest version on x86-64, which has another layout. */
  system_wait = (wait_function)dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
  if (!system_wait) system_wait = (wait_function)dlsym(RTLD_NEXT, "pthread_cond_timedwait");
  const char *path = getenv("CHAOS_CLOCK");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *mapped = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
  close(file);
  if (mapped != MAP_FAILED) offset = mapped;
}

int clock_gettime(clockid_t id, struct timespec *now) {
  if (!system_clock) start();
  int failed = system_clock(id, now);
  if (!failed && offset && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += *offset;
  return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  (void)zone;
  struct timespec exact;
  if (clock_gettime(CLOCK_REALTIME, &exact)) return -1;
  now->tv_sec = exact.tv_sec;
  now->tv_usec = exact.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *result) {
  struct timespec exact;
  if (clock_gettime(CLOCK_REALTIME, &exact)) return -1;
  if (result) *result = exact.tv_sec;
  return exact.tv_sec;
}

/* A condition does not say which clock it uses. The monotonic clock, which starts with the system, is years behind. */
int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
  if (!system_wait) start();
  struct timespec exact = *until, uptime;
  system_clock(CLOCK_MONOTONIC, &uptime);
  if (offset && exact.tv_sec / 2 > uptime.tv_sec) exact.tv_sec -= *offset;
  return system_wait(condition, mutex, &exact);
}
