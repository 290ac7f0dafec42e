/* Puts the wall clock of a program an hour ahead: loaded with LD_PRELOAD into any program, whatever its C library. */

enum { REALTIME = 0, HOUR = 3600 };

struct timespec {
    long seconds;
    long nanoseconds;
};

struct timeval {
    long seconds;
    long microseconds;
};

static long system_call(long number, long first, void *second)
{
    long result;
#if defined(__x86_64__)
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(first), "S"(second) : "rcx", "r11", "memory");
#elif defined(__aarch64__)
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = first;
    register void *x1 __asm__("x1") = second;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1) : "memory");
    result = x0;
#endif
    return result;
}

#if defined(__x86_64__)
#define CLOCK_GETTIME 228
#elif defined(__aarch64__)
#define CLOCK_GETTIME 113
#endif

int clock_gettime(int clock, struct timespec *now)
{
    long result = system_call(CLOCK_GETTIME, clock, now);
    if (result == 0 && clock == REALTIME)
        now->seconds += HOUR;
    return result == 0 ? 0 : -1;
}

int gettimeofday(struct timeval *now, void *zone)
{
    struct timespec precise;
    (void)zone;
    if (clock_gettime(REALTIME, &precise) != 0)
        return -1;
    now->seconds = precise.seconds;
    now->microseconds = precise.nanoseconds / 1000;
    return 0;
}

long time(long *now)
{
    struct timespec precise;
    clock_gettime(REALTIME, &precise);
    if (now)
        *now = precise.seconds;
    return precise.seconds;
}
