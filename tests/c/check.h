/* The unit tests' few words: TEST(behaviour) { … CHECK(…) … }  and  CHECK_MAIN() at the end of the file.
 * A program runs all its tests, or those whose names are given as arguments, and prints one line each. */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct check_test {
    const char *name;
    void (*run)(void);
    struct check_test *next;
};

static struct check_test *check_first, **check_last __attribute__((unused)) = &check_first;

#define TEST(behaviour)                                                                                                   \
    static void test_##behaviour(void);                                                                                    \
    static struct check_test check_##behaviour = {#behaviour, test_##behaviour, NULL};                                      \
    __attribute__((constructor)) static void check_add_##behaviour(void)                                                    \
    {                                                                                                                       \
        *check_last = &check_##behaviour;                                                                                   \
        check_last = &check_##behaviour.next;                                                                               \
    }                                                                                                                       \
    static void test_##behaviour(void)

#define CHECK(condition)                                                                                                    \
    do {                                                                                                                    \
        if (!(condition)) {                                                                                                 \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);                                       \
            exit(1);                                                                                                        \
        }                                                                                                                   \
    } while (0)

#define CHECK_EQUAL(actual, expected)                                                                                       \
    do {                                                                                                                    \
        long long check_actual = (long long)(actual), check_expected = (long long)(expected);                               \
        if (check_actual != check_expected) {                                                                               \
            fprintf(stderr, "%s:%d: %s is %lld, expected %lld\n", __FILE__, __LINE__, #actual, check_actual,                 \
                    check_expected);                                                                                        \
            exit(1);                                                                                                        \
        }                                                                                                                   \
    } while (0)

#define CHECK_MAIN()                                                                                                        \
    int main(int count, char **names)                                                                                       \
    {                                                                                                                       \
        setvbuf(stdout, NULL, _IOLBF, 0);                                                                                   \
        for (struct check_test *test = check_first; test; test = test->next) {                                              \
            bool wanted = count < 2;                                                                                        \
            for (int i = 1; i < count; i++)                                                                                 \
                wanted |= strcmp(names[i], test->name) == 0;                                                                \
            if (!wanted)                                                                                                    \
                continue;                                                                                                   \
            test->run();                                                                                                    \
            printf("ok %s\n", test->name);                                                                                  \
        }                                                                                                                   \
        return 0;                                                                                                           \
    }

#endif
