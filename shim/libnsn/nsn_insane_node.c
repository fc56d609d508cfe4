/* Who serves an application ID on this host: the loopback port says it, with the INFO line of a NATS server; and starting
 * an nsnd where nobody does. */
#include <arpa/inet.h>
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "nsn_insane_internal.h"

#define ANSWER_NS (5 * NSN_SECOND_NS)
#define START_NS (20 * NSN_SECOND_NS) /* a loaded machine takes its time to start an interpreter */
#define LOOK_NS 10000000ull
#define INFO_MAX 65536
#define ARGUMENTS_MAX 16

extern char **environ;

/* --- the INFO line ------------------------------------------------------------------------------------------------ */

struct json { const char *at, *end; };

static void skip_space(struct json *json)
{
    while (json->at < json->end && isspace((unsigned char)*json->at))
        json->at++;
}

static bool next_is(struct json *json, char character)
{
    skip_space(json);
    if (json->at == json->end || *json->at != character)
        return false;
    json->at++;
    return true;
}

static size_t put_utf8(uint32_t code, char *to)
{
    if (code < 0x80) {
        to[0] = (char)code;
        return 1;
    }
    if (code < 0x800) {
        to[0] = (char)(0xc0 | code >> 6);
        to[1] = (char)(0x80 | (code & 0x3f));
        return 2;
    }
    to[0] = (char)(0xe0 | code >> 12);
    to[1] = (char)(0x80 | (code >> 6 & 0x3f));
    to[2] = (char)(0x80 | (code & 0x3f));
    return 3;
}

/* One character of a string; 0 when it is broken. A pair of surrogates comes out as two: no path of ours has one. */
static size_t read_character(struct json *json, char to[4])
{
    static const char escaped[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    char character = *json->at++;
    if (character != '\\') {
        to[0] = character;
        return 1;
    }
    if (json->at == json->end)
        return 0;
    character = *json->at++;
    const char *found = strchr(escaped, character);
    if (character && found) {
        to[0] = meant[found - escaped];
        return 1;
    }
    char digits[5] = "", *end;
    if (character != 'u' || json->end - json->at < 4)
        return 0;
    memcpy(digits, json->at, 4);
    json->at += 4;
    uint32_t code = (uint32_t)strtoul(digits, &end, 16);
    return end == digits + 4 ? put_utf8(code, to) : 0;
}

/* A string's characters into text, cut to its size; text may be NULL. */
static bool read_string(struct json *json, char *text, size_t size)
{
    if (!next_is(json, '"'))
        return false;
    size_t used = 0;
    while (json->at < json->end && *json->at != '"') {
        char character[4];
        size_t length = read_character(json, character);
        if (!length)
            return false;
        if (text && used + length < size) {
            memcpy(text + used, character, length);
            used += length;
        }
    }
    if (text)
        text[used] = 0;
    return next_is(json, '"');
}

static bool read_number(struct json *json, uint64_t *number)
{
    skip_space(json);
    *number = 0;
    const char *begin = json->at;
    for (; json->at < json->end && isdigit((unsigned char)*json->at); json->at++)
        *number = *number * 10 + (uint64_t)(*json->at - '0');
    return json->at > begin;
}

/* Any value: up to the comma or bracket that ends it. */
static bool skip_value(struct json *json)
{
    int depth = 0;
    for (skip_space(json); json->at < json->end; skip_space(json)) {
        char character = *json->at;
        if (character == '"') {
            if (!read_string(json, NULL, 0))
                return false;
            continue;
        }
        if (!depth && (character == ',' || character == '}' || character == ']'))
            return true;
        depth += (character == '{' || character == '[') - (character == '}' || character == ']');
        json->at++;
    }
    return false;
}

static bool read_node(struct json *json, struct nsn_node *node);

/* An object's members; those of the top one but "insane" are nothing to us. */
static bool read_object(struct json *json, struct nsn_node *node, bool top, bool *found)
{
    char key[32];
    if (!next_is(json, '{'))
        return false;
    if (next_is(json, '}'))
        return true;
    do {
        bool good;
        if (!read_string(json, key, sizeof key) || !next_is(json, ':'))
            return false;
        skip_space(json);
        if (top && strcmp(key, "insane") == 0 && json->at < json->end && *json->at == '{')
            *found = good = read_node(json, node);
        else if (!top && strcmp(key, "socket") == 0)
            good = read_string(json, node->socket, sizeof node->socket);
        else if (!top && strcmp(key, "uid") == 0)
            good = read_number(json, &node->uid);
        else if (!top && strcmp(key, "pid") == 0)
            good = read_number(json, &node->pid);
        else
            good = skip_value(json);
        if (!good)
            return false;
    } while (next_is(json, ','));
    return next_is(json, '}');
}

static bool read_node(struct json *json, struct nsn_node *node) { return read_object(json, node, false, NULL); }

int nsn_node_parse(const char *line, size_t length, struct nsn_node *node)
{
    *node = (struct nsn_node){0};
    bool found = false;
    if (length < 5 || strncasecmp(line, "INFO ", 5) != 0)
        return -EPROTO;
    struct json json = {line + 5, line + length};
    if (!read_object(&json, node, true, &found))
        return -EPROTO;
    return !found ? -ENOENT : node->socket[0] ? 0 : -EPROTO;
}

/* --- asking ------------------------------------------------------------------------------------------------------- */

static int wait_for(int fd, short events, uint64_t deadline)
{
    for (;;) {
        uint64_t now = nsn_now_ns();
        struct pollfd one = {.fd = fd, .events = events};
        int ready = now >= deadline ? 0 : poll(&one, 1, (int)((deadline - now) / 1000000 + 1));
        if (ready > 0)
            return 0;
        if (ready == 0)
            return -ETIMEDOUT;
        if (errno != EINTR)
            return -errno;
    }
}

static int connect_to(uint32_t port, uint64_t deadline)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), error = 0;
    if (fd < 0)
        return -errno;
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
        error = -errno;
        if (error == -EINPROGRESS || error == -EINTR) {
            socklen_t length = sizeof error;
            error = wait_for(fd, POLLOUT, deadline);
            if (!error && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0)
                error = -error;
        }
    }
    if (error) {
        close(fd);
        return error;
    }
    return fd;
}

/* The first line; its length, or a negative errno. */
static ssize_t read_first_line(int fd, char *line, size_t size, uint64_t deadline)
{
    size_t used = 0;
    while (used < size) {
        ssize_t count = recv(fd, line + used, size - used, 0);
        if (count > 0) {
            char *end = memchr(line + used, '\n', (size_t)count);
            used += (size_t)count;
            if (end)
                return end - line;
        } else if (count == 0) {
            return -EPROTO;
        } else if (errno == EAGAIN) {
            int result = wait_for(fd, POLLIN, deadline);
            if (result < 0)
                return result;
        } else if (errno != EINTR) {
            return errno == ECONNRESET ? -EPROTO : -errno;
        }
    }
    return -EPROTO;
}

/* -ECONNREFUSED without words: nobody is there. */
static int ask(uint32_t port, struct nsn_node *node)
{
    uint64_t deadline = nsn_now_ns() + ANSWER_NS;
    int fd = connect_to(port, deadline);
    if (fd == -ECONNREFUSED)
        return fd;
    char *line = malloc(INFO_MAX);
    ssize_t length = fd < 0 ? fd : line ? read_first_line(fd, line, INFO_MAX, deadline) : -ENOMEM;
    int result = length < 0 ? (int)length : nsn_node_parse(line, (size_t)length, node);
    if (fd >= 0)
        close(fd);
    free(line);
    if (result == -ENOENT)
        return nsn_insane_fail(-EADDRINUSE, "port %u, which application ID %u stands for, belongs to a NATS server, and "
                               "INSANE's primitives need an insane_nats node: choose another l4_port, or stop the server",
                               port, port);
    if (result == -EPROTO)
        return nsn_insane_fail(-EADDRINUSE, "port %u, which application ID %u stands for, belongs to a program that is no "
                               "insane_nats node: choose another l4_port", port, port);
    if (result == -ETIMEDOUT)
        return nsn_insane_fail(result, "whoever listens on port %u of 127.0.0.1 says nothing for %d s: is that nsnd stopped "
                               "or overloaded?", port, (int)(ANSWER_NS / NSN_SECOND_NS));
    if (result < 0)
        return nsn_insane_fail(result, "no connection to port %u of 127.0.0.1: %s", port, strerror(-result));
    return 0;
}

/* --- starting ----------------------------------------------------------------------------------------------------- */

static bool forbidden(void)
{
    const char *word = getenv("INSANE_NATS_AUTOSTART");
    return word && (strcmp(word, "0") == 0 || strcasecmp(word, "no") == 0 || strcasecmp(word, "false") == 0 ||
                    strcasecmp(word, "off") == 0);
}

/* The nsnd that was installed with this library, which lies in PREFIX/lib/pythonX/site-packages/insane_nats/lib; else the
 * one on PATH. */
static const char *find_nsnd(char *path, size_t size)
{
    Dl_info info;
    char real[PATH_MAX];
    if (dladdr(__extension__(void *)find_nsnd, &info) && info.dli_fname && realpath(info.dli_fname, real)) {
        for (int up = 0; up < 6; up++) {
            char *slash = strrchr(real, '/');
            if (!slash)
                return "nsnd";
            *slash = 0;
        }
        if ((size_t)snprintf(path, size, "%s/bin/nsnd", real) < size && access(path, X_OK) == 0)
            return path;
    }
    return "nsnd";
}

/* The last line of what a command wrote before it ended. */
static void last_words(int fd, char *words, size_t size)
{
    char text[2048];
    size_t used = 0;
    ssize_t count;
    while (used < sizeof text - 1 && (count = read(fd, text + used, sizeof text - 1 - used)) > 0)
        used += (size_t)count;
    while (used && isspace((unsigned char)text[used - 1]))
        used--;
    text[used] = 0;
    char *newline = strrchr(text, '\n');
    snprintf(words, size, "%.*s", (int)size - 1, newline ? newline + 1 : text);
}

static int spawn(char *const *arguments, int words, pid_t *pid)
{
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t none, defaults;
    sigemptyset(&none);
    sigemptyset(&defaults);
    sigaddset(&defaults, SIGPIPE);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, words, 2);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &defaults);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    int error = posix_spawnp(pid, arguments[0], &actions, &attributes, arguments, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    return -error;
}

/* Its exit status, -ETIMEDOUT, or -ECHILD where the program reaps all children itself. */
static int await(pid_t pid, uint64_t deadline)
{
    for (;;) {
        int status;
        pid_t ended = waitpid(pid, &status, WNOHANG);
        if (ended == pid)
            return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        if (ended < 0 && errno != EINTR)
            return -errno;
        if (nsn_now_ns() >= deadline) {
            kill(pid, SIGKILL);
            waitpid(pid, &status, 0);
            return -ETIMEDOUT;
        }
        nanosleep(&(struct timespec){.tv_nsec = LOOK_NS}, NULL);
    }
}

static int not_started(uint32_t application_id, const char *command, const char *why)
{
    return nsn_insane_fail(-ECONNREFUSED, "nobody serves application ID %u, and %s --autostart --port %u failed: %s",
                           application_id, command, application_id, why);
}

/* `nsnd --autostart` returns when a node serves the port, exactly one, whoever else does the same. */
static int start(uint32_t application_id, char *const *command)
{
    char path[PATH_MAX], port[16], *arguments[ARGUMENTS_MAX + 4];
    int count = 0, words[2];
    for (; command && command[count]; count++) {
        if (count == ARGUMENTS_MAX)
            return nsn_insane_fail(-EINVAL, "a command for nsnd has at most %d words", ARGUMENTS_MAX);
        arguments[count] = command[count];
    }
    if (!count)
        arguments[count++] = (char *)find_nsnd(path, sizeof path);
    snprintf(port, sizeof port, "%u", application_id);
    arguments[count++] = "--autostart";
    arguments[count++] = "--port";
    arguments[count++] = port;
    arguments[count] = NULL;
    if (pipe2(words, O_CLOEXEC) < 0)
        return nsn_insane_fail(-errno, "no pipe for starting nsnd: %s", strerror(errno));
    fcntl(words[0], F_SETFL, O_NONBLOCK);
    pid_t pid;
    int result = spawn(arguments, words[1], &pid);
    close(words[1]);
    if (result == -ENOENT)
        nsn_insane_fail(result = -ECONNREFUSED, "nobody serves application ID %u, and there is no nsnd to be started: "
                        "install insane_nats so that nsnd is on PATH, or start nsnd --port %u yourself", application_id,
                        application_id);
    else if (result < 0)
        result = not_started(application_id, arguments[0], strerror(-result));
    else
        result = await(pid, nsn_now_ns() + START_NS);
    char text[256];
    if (result > 0) {
        last_words(words[0], text, sizeof text);
        result = not_started(application_id, arguments[0], text[0] ? text : "it said nothing");
    } else if (result == -ETIMEDOUT) {
        result = not_started(application_id, arguments[0], "it took more than 20 s");
    } else if (result == -ECHILD) {
        result = 0; /* whether it did what it should is seen at the port */
    }
    close(words[0]);
    return result;
}

int nsn_node_find(uint32_t application_id, char *const *command, struct nsn_node *node)
{
    int result = ask(application_id, node);
    if (result != -ECONNREFUSED)
        return result;
    if (forbidden())
        return nsn_insane_fail(result, "nobody serves application ID %u, and INSANE_NATS_AUTOSTART=%s forbids to start an "
                               "nsnd: start one (nsnd --port %u), or unset INSANE_NATS_AUTOSTART", application_id,
                               getenv("INSANE_NATS_AUTOSTART"), application_id);
    result = start(application_id, command);
    if (result < 0)
        return result;
    uint64_t deadline = nsn_now_ns() + ANSWER_NS;
    while ((result = ask(application_id, node)) == -ECONNREFUSED && nsn_now_ns() < deadline)
        nanosleep(&(struct timespec){.tv_nsec = LOOK_NS}, NULL);
    return result == -ECONNREFUSED ? not_started(application_id, "nsnd", "it serves the port no more") : result;
}
