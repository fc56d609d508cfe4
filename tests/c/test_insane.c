/* INSANE's primitives on a node in a thread: buffers, handles, sinks, callbacks, threads; nsn-app.cfg and the INFO line. */
#include "insane_node.h"
#include "nsn_insane_internal.h"

#define FOREVER UINT64_MAX
#define SECONDS(n) ((n) * 1000000000ull)

struct pair {
    struct insane_node *node;
    struct nsn_insane *a, *b;     /* a emits, b consumes, on channel 7 */
    uint32_t source, sink;
};

static struct pair pair_with(int consumption, int reliability)
{
    struct pair pair = {.node = insane_node_start()};
    pair.a = insane_session(pair.node);
    pair.b = insane_session(pair.node);
    CHECK_EQUAL(nsn_insane_create_source(pair.a, insane_stream(pair.a, consumption, reliability), 7, &pair.source), 0);
    CHECK_EQUAL(nsn_insane_create_sink(pair.b, insane_stream(pair.b, consumption, reliability), 7, NULL, &pair.sink), 0);
    return pair;
}

static struct pair pair_start(void) { return pair_with(NSN_QOS_CONSUMPTION_LOW, NSN_QOS_RELIABILITY_RELIABLE); }

static void pair_stop(const struct pair *pair)
{
    CHECK_EQUAL(nsn_insane_close(pair->a, 0), 0);
    CHECK_EQUAL(nsn_insane_close(pair->b, 0), 0);
    insane_node_stop(pair->node);
}

static int emit(struct nsn_insane *insane, uint32_t source, const void *bytes, size_t length)
{
    struct nsn_buffer *buffer;
    CHECK_EQUAL(nsn_insane_get_buffer(insane, length, FOREVER, &buffer), 0);
    CHECK_EQUAL(buffer->len, length);
    memcpy(buffer->data, bytes, length);
    int token = nsn_insane_emit(insane, source, buffer, 0);
    if (token < 0)
        fprintf(stderr, "%s\n", nsn_insane_error());
    CHECK(token > 0);
    return token;
}

static struct nsn_buffer *consume(struct nsn_insane *insane, uint32_t sink)
{
    struct nsn_buffer *buffer;
    int result = nsn_insane_consume(insane, sink, SECONDS(20), 0, &buffer);
    if (result < 0)
        fprintf(stderr, "%s\n", nsn_insane_error());
    CHECK_EQUAL(result, 0);
    return buffer;
}

static void expect(struct nsn_insane *insane, uint32_t sink, const char *text)
{
    struct nsn_buffer *buffer = consume(insane, sink);
    CHECK_EQUAL(buffer->len, strlen(text));
    CHECK_EQUAL(memcmp(buffer->data, text, strlen(text)), 0);
    CHECK_EQUAL(nsn_insane_release(insane, buffer), 1);
}

/* --- what is read ------------------------------------------------------------------------------------------------- */

static int read_config(const char *text, struct nsn_app_config *config)
{
    FILE *file = fopen("nsn-app.cfg", "w");
    CHECK(file);
    fputs(text, file);
    fclose(file);
    int result = nsn_app_config_read("nsn-app.cfg", config);
    remove("nsn-app.cfg");
    return result;
}

TEST(configuration_is_read)
{
    struct nsn_app_config config;
    CHECK_EQUAL(read_config("###\n# INSANE APP config file\n###\n[app]\nl4_port=4444", &config), 0);
    CHECK_EQUAL(config.application_id, 4444);
    CHECK_EQUAL(config.log_level, NSN_LOG_WARN);
    CHECK_EQUAL(config.echo, 0);
    CHECK_EQUAL(read_config("[other]\nl4_port = 1\n [ app ]  # ours\n\tl4_port = 65535 # \"the\" ID\r\nlog_level = \"error\"\n"
                            "echo = true\nname = \"a # b\"\n[app.more]\nl4_port = 3\n", &config), 0);
    CHECK_EQUAL(config.application_id, 65535);
    CHECK_EQUAL(config.log_level, NSN_LOG_ERROR);
    CHECK_EQUAL(config.echo, 1);
    CHECK_EQUAL(read_config("[app]\nl4_port = 1\nuser = \"a \\\"#\\\\\" # who\npassword = '\\\"#' \ntoken = \"t\"\n", &config),
                0);
    CHECK(strcmp(config.user, "a \"#\\") == 0);
    CHECK(strcmp(config.password, "\\\"#") == 0);
    CHECK(strcmp(config.token, "t") == 0);
}

TEST(mistakes_in_the_configuration_are_told_with_their_line)
{
    static const struct { const char *text, *words; } cases[] = {
        {"", "says no application ID"},
        {"[app]\n", "says no application ID"},
        {"[app]\nl4_port = 0\n", "nsn-app.cfg:2: l4_port = 0: allowed is a whole number from 1 to 65535"},
        {"[app]\nl4_port = 65536\n", "allowed is"},
        {"[app]\nl4_port = \"12\"\n", "allowed is"},
        {"[app]\nl4_port = 12x\n", "allowed is"},
        {"[app]\nl4_port = 99999999999999999999\n", "allowed is"},
        {"[app]\n\nl4_port\n", "nsn-app.cfg:3: l4_port: expected is key = value"},
        {"[app]\nl4_port =\n", "has no value"},
        {"[app]\n= 3\n", "expected is key = value"},
        {"[app\nl4_port = 1\n", "nsn-app.cfg:1: [app: a section is written as [app]"},
        {"[]\n", "a section is written"},
        {"[app]\nl4_port = 1\nlog_level = \"loud\"\n", "nsn-app.cfg:3: log_level"},
        {"[app]\nl4_port = 1\necho = yes\n", "true or false"},
        {"[app]\nl4_port = 1\npassword = s3cret\n", "nsn-app.cfg:3: password = …: allowed is a text in quotes"},
        {"[app]\nl4_port = 1\npassword = \"\"\n", "password = …"},
        {"[app]\nl4_port = 1\npassword = \"a\"b\"\n", "password = …"},
        {"[app]\nl4_port = 1\npassword = \"a\\n\"\n", "password = …"},
        {"[app]\nl4_port = 1\npassword = \"a\\\"\n", "password = …"},
    };
    struct nsn_app_config config;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        CHECK_EQUAL(read_config(cases[i].text, &config), -EINVAL);
        if (!strstr(nsn_insane_error(), cases[i].words))
            fprintf(stderr, "case %zu: %s\n", i, nsn_insane_error());
        CHECK(strstr(nsn_insane_error(), cases[i].words));
    }
    static char longest[6000];
    memset(longest, 'x', sizeof longest - 1);
    CHECK_EQUAL(read_config(longest, &config), -EINVAL);
    CHECK_EQUAL(nsn_app_config_read("missing.cfg", &config), -ENOENT);
    CHECK(strstr(nsn_insane_error(), "INSANE_APP_CONFIG"));
    CHECK_EQUAL(nsn_app_config_read(".", &config), -EIO);
}

static int parse(const char *line, struct nsn_node *node) { return nsn_node_parse(line, strlen(line), node); }

TEST(info_names_the_nodes_socket)
{
    struct nsn_node node;
    CHECK_EQUAL(parse("INFO {\"a\":[1,{\"socket\":\"no\"}],\"insane\":{\"uid\":7, \"x\":{\"socket\":\"no\"},\"socket\" : "
                      "\"/r/\\u00e9\\\"s\\/k\",\"pid\":12},\"z\":null} \r", &node), 0);
    CHECK_EQUAL(strcmp(node.socket, "/r/\xc3\xa9\"s/k"), 0);
    CHECK_EQUAL(node.uid, 7);
    CHECK_EQUAL(node.pid, 12);
    CHECK_EQUAL(parse("INFO {\"server_id\":\"N\",\"socket\":\"/x\"}", &node), -ENOENT);
    CHECK_EQUAL(parse("INFO {}", &node), -ENOENT);
    static const char *broken[] = {
        "", "INF", "HTTP/1.1 200", "INFO ", "INFO x", "INFO {", "INFO {\"insane\":{\"socket\":\"/x\"",
        "INFO {\"insane\":{\"socket\":\"/x}", "INFO {\"insane\":{}}", "INFO {\"insane\":{\"pid\":x}}", "INFO {\"a\" 1}",
        "INFO {\"a\":\"\\", "INFO {\"a\":\"\\u12", "INFO {\"a\":\"\\q\"}", "INFO {a:1}",
    };
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++)
        CHECK_EQUAL(parse(broken[i], &node), -EPROTO);
}

TEST(any_info_is_survived)
{
    static const char good[] = "INFO {\"a\":[1,\"\\u0041\"],\"insane\":{\"uid\":7,\"socket\":\"/r/s\",\"pid\":12}} \r";
    struct nsn_node node;
    uint64_t random = 88172645463325252ull;
    for (int round = 0; round < 20000; round++) {
        size_t length = sizeof good - 1;
        char *line = malloc(length);
        memcpy(line, good, length);
        for (int change = 0; change < 3; change++) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            line[random % length] = "\"\\{}[]:,u \0a1"[(random >> 32) % 13];
        }
        nsn_node_parse(line, random % (length + 1), &node);
        free(line);
    }
}

/* --- buffers ------------------------------------------------------------------------------------------------------ */

TEST(buffer_goes_back_once)
{
    struct pair pair = pair_start();
    struct nsn_buffer *buffer, stale;
    for (size_t size = 0; size <= 100000; size = size * 10 + 1) {
        CHECK_EQUAL(nsn_insane_get_buffer(pair.a, size, 0, &buffer), 0);
        stale = *buffer;
        CHECK_EQUAL(nsn_insane_release(pair.b, buffer), -EINVAL); /* another session's */
        CHECK_EQUAL(nsn_insane_release(pair.a, buffer), 1);
        CHECK_EQUAL(nsn_insane_release(pair.a, buffer), -EINVAL);
        CHECK_EQUAL(nsn_insane_emit(pair.a, pair.source, buffer, 0), -EINVAL);
        CHECK_EQUAL(nsn_insane_get_buffer(pair.a, size, 0, &buffer), 0);
        CHECK_EQUAL(nsn_insane_release(pair.a, &stale), -EINVAL); /* also when its place is used again */
        stale = *buffer;
        CHECK_EQUAL(nsn_insane_release(pair.a, &stale), 1); /* a copy stands for the buffer */
    }
    struct nsn_buffer invented = {.index = 12345678901234, .data = stale.data};
    CHECK_EQUAL(nsn_insane_release(pair.a, &invented), -EINVAL);
    CHECK_EQUAL(nsn_insane_release(pair.a, NULL), -EINVAL);
    CHECK_EQUAL(emit(pair.a, pair.source, "x", 1), 1);
    buffer = consume(pair.b, pair.sink);
    CHECK_EQUAL(nsn_insane_release(pair.b, buffer), 1);
    CHECK_EQUAL(nsn_insane_release(pair.b, buffer), -EINVAL);
    pair_stop(&pair);
}

TEST(emission_cannot_be_longer_than_its_buffer)
{
    struct pair pair = pair_start();
    struct nsn_buffer *buffer;
    CHECK_EQUAL(nsn_insane_get_buffer(pair.a, 100, 0, &buffer), 0);
    buffer->len = 1 << 20;
    CHECK_EQUAL(nsn_insane_emit(pair.a, pair.source, buffer, 0), -EMSGSIZE);
    buffer->len = 5;
    memcpy(buffer->data, "hello", 5);
    CHECK(nsn_insane_emit(pair.a, pair.source, buffer, 0) > 0);
    expect(pair.b, pair.sink, "hello");
    CHECK_EQUAL(nsn_insane_get_buffer(pair.a, (1 << 20) + 1, 0, &buffer), -EMSGSIZE);
    pair_stop(&pair);
}

TEST(buffers_are_held_in_any_number_and_order)
{
    enum { COUNT = 3000 };
    static struct nsn_buffer *held[COUNT];
    struct pair pair = pair_start();
    char text[40000];
    memset(text, 'x', sizeof text);
    for (int i = 0; i < COUNT; i++) {
        snprintf(text, 20, "%019d", i);
        emit(pair.a, pair.source, text, i % 100 ? 20 : sizeof text);
    }
    for (int i = 0; i < COUNT; i++)
        held[i] = consume(pair.b, pair.sink);
    for (int i = 0; i < COUNT; i++)
        CHECK_EQUAL(atoi((const char *)held[i]->data), i);
    for (int i = 0; i < COUNT; i += 2)
        CHECK_EQUAL(nsn_insane_release(pair.b, held[i]), 1);
    for (int i = COUNT - 1; i > 0; i -= 2)
        CHECK_EQUAL(nsn_insane_release(pair.b, held[i]), 1);
    pair_stop(&pair);
}

TEST(closing_takes_held_buffers_back)
{
    struct pair pair = pair_start();
    struct nsn_buffer *buffer;
    char large[20000] = {0};
    emit(pair.a, pair.source, "x", 1);
    emit(pair.a, pair.source, large, sizeof large);
    struct nsn_buffer *small = consume(pair.b, pair.sink), *big = consume(pair.b, pair.sink);
    CHECK_EQUAL(nsn_insane_get_buffer(pair.a, 10, 0, &buffer), 0);
    CHECK_EQUAL(nsn_insane_get_buffer(pair.a, 50000, 0, &buffer), 0);
    struct nsn_buffer copies[2] = {*small, *big};
    CHECK_EQUAL(nsn_insane_close(pair.a, 0), 0);
    CHECK_EQUAL(nsn_insane_close(pair.b, 0), 0);
    struct nsn_insane *next = insane_session(pair.node);
    CHECK_EQUAL(nsn_insane_release(next, &copies[0]), -EINVAL);
    CHECK_EQUAL(nsn_insane_release(next, &copies[1]), -EINVAL);
    CHECK_EQUAL(nsn_insane_close(next, 0), 0);
    insane_node_stop(pair.node);
}

/* --- handles ------------------------------------------------------------------------------------------------------ */

TEST(stale_handles_are_known)
{
    struct pair pair = pair_start();
    struct nsn_buffer *buffer;
    uint32_t stream = insane_stream(pair.a, NSN_QOS_CONSUMPTION_LOW, NSN_QOS_RELIABILITY_RELIABLE), source, sink, other;
    CHECK_EQUAL(nsn_insane_create_source(pair.a, stream, 1, &source), 0);
    CHECK_EQUAL(nsn_insane_create_sink(pair.a, stream, 1, NULL, &sink), 0);
    CHECK_EQUAL(nsn_insane_destroy_stream(pair.a, stream), 0);
    CHECK_EQUAL(nsn_insane_destroy_stream(pair.a, stream), -EBADF);
    CHECK_EQUAL(nsn_insane_destroy_source(pair.a, source), -EBADF);
    CHECK_EQUAL(nsn_insane_destroy_sink(pair.a, sink), -EBADF);
    CHECK_EQUAL(nsn_insane_create_source(pair.a, stream, 1, &other), -EBADF);
    CHECK_EQUAL(nsn_insane_create_sink(pair.a, stream, 1, NULL, &other), -EBADF);
    CHECK_EQUAL(nsn_insane_consume(pair.a, sink, 0, 0, &buffer), -EBADF);
    CHECK_EQUAL(nsn_insane_available(pair.a, sink, 0), -EBADF);
    uint32_t again = insane_stream(pair.a, NSN_QOS_CONSUMPTION_LOW, NSN_QOS_RELIABILITY_RELIABLE);
    CHECK(again != stream); /* in the same place */
    CHECK_EQUAL(nsn_insane_get_buffer(pair.a, 1, 0, &buffer), 0);
    CHECK_EQUAL(nsn_insane_emit(pair.a, source, buffer, 0), -EBADF);
    CHECK_EQUAL(nsn_insane_release(pair.a, buffer), 1);
    for (uint32_t handle = 0; handle < 5; handle++)
        CHECK_EQUAL(nsn_insane_outcome(pair.a, UINT32_MAX - handle, 1), -EBADF);
    CHECK_EQUAL(nsn_insane_create_sink(pair.a, again, UINT32_MAX, NULL, &other), -EINVAL);
    struct nsn_options options = {.consumption = 3};
    CHECK_EQUAL(nsn_insane_create_stream(pair.a, &options, &other), -EINVAL);
    pair_stop(&pair);
}

TEST(outcome_is_the_number_of_sinks)
{
    struct pair pair = pair_start();
    uint32_t stream = insane_stream(pair.b, NSN_QOS_CONSUMPTION_LOW, NSN_QOS_RELIABILITY_RELIABLE), second;
    int first = emit(pair.a, pair.source, "1", 1);
    CHECK_EQUAL(nsn_insane_outcome(pair.a, pair.source, first), 1);
    CHECK_EQUAL(nsn_insane_create_sink(pair.b, stream, 7, NULL, &second), 0);
    CHECK_EQUAL(nsn_insane_outcome(pair.a, pair.source, emit(pair.a, pair.source, "2", 1)), 2);
    CHECK_EQUAL(nsn_insane_destroy_sink(pair.b, second), 0);
    CHECK_EQUAL(nsn_insane_destroy_sink(pair.b, pair.sink), 0);
    int token;
    do /* that nobody listens any more is known a moment later */
        token = emit(pair.a, pair.source, "3", 1);
    while (nsn_insane_outcome(pair.a, pair.source, token) != 0);
    for (int i = 0; i < 256; i++)
        token = emit(pair.a, pair.source, "4", 1);
    CHECK_EQUAL(nsn_insane_outcome(pair.a, pair.source, token), 0);
    CHECK_EQUAL(nsn_insane_outcome(pair.a, pair.source, first), -ENOENT);
    CHECK_EQUAL(nsn_insane_outcome(pair.a, pair.source, token + 1), -ENOENT);
    CHECK_EQUAL(nsn_insane_outcome(pair.a, pair.source, -1), -ENOENT);
    pair_stop(&pair);
}

/* --- sinks -------------------------------------------------------------------------------------------------------- */

TEST(session_does_not_hear_itself_unless_it_wants_to)
{
    struct insane_node *node = insane_node_start();
    struct nsn_buffer *buffer;
    for (int echo = 0; echo < 2; echo++) {
        struct nsn_insane *insane = insane_session_with(node, (struct nsn_insane_options){.echo = echo});
        uint32_t stream = insane_stream(insane, NSN_QOS_CONSUMPTION_LOW, NSN_QOS_RELIABILITY_RELIABLE), source, sink;
        CHECK_EQUAL(nsn_insane_create_source(insane, stream, 7, &source), 0);
        CHECK_EQUAL(nsn_insane_create_sink(insane, stream, 7, NULL, &sink), 0);
        CHECK_EQUAL(nsn_insane_outcome(insane, source, emit(insane, source, "x", 1)), echo);
        CHECK_EQUAL(nsn_insane_consume(insane, sink, 0, 0, &buffer), echo ? 0 : -EAGAIN);
        CHECK_EQUAL(nsn_insane_close(insane, 0), 0);
    }
    insane_node_stop(node);
}

TEST(every_sink_of_a_channel_gets_every_message)
{
    enum { SINKS = 100 };
    struct pair pair = pair_start();
    uint32_t sinks[SINKS], stream = insane_stream(pair.b, NSN_QOS_CONSUMPTION_LOW, NSN_QOS_RELIABILITY_RELIABLE);
    char large[20000];
    memset(large, 'y', sizeof large);
    for (int i = 0; i < SINKS; i++)
        CHECK_EQUAL(nsn_insane_create_sink(pair.b, stream, 7, NULL, &sinks[i]), 0);
    CHECK_EQUAL(nsn_insane_outcome(pair.a, pair.source, emit(pair.a, pair.source, "x", 1)), SINKS + 1);
    CHECK_EQUAL(nsn_insane_outcome(pair.a, pair.source, emit(pair.a, pair.source, large, sizeof large)), SINKS + 1);
    for (int i = 0; i < SINKS; i++)
        expect(pair.b, sinks[i], "x");
    for (int i = 0; i < SINKS; i++) {
        struct nsn_buffer *buffer = consume(pair.b, sinks[i]);
        CHECK(buffer->len == sizeof large && memcmp(buffer->data, large, sizeof large) == 0);
        if (i % 2)
            CHECK_EQUAL(nsn_insane_release(pair.b, buffer), 1);
    }
    pair_stop(&pair);
}

TEST(available_counts_what_can_be_consumed)
{
    struct pair pair = pair_start();
    CHECK_EQUAL(nsn_insane_available(pair.b, pair.sink, 0), 0);
    CHECK_EQUAL(nsn_insane_available(pair.b, pair.sink, 1000000), -ETIMEDOUT);
    for (int i = 0; i < 5; i++)
        emit(pair.a, pair.source, "x", 1);
    CHECK(nsn_insane_available(pair.b, pair.sink, SECONDS(20)) > 0);
    while (nsn_insane_available(pair.b, pair.sink, 0) < 5)
        nsn_insane_look(pair.b);
    for (int left = 4; left >= 0; left--) {
        expect(pair.b, pair.sink, "x");
        CHECK_EQUAL(nsn_insane_available(pair.b, pair.sink, 0), left);
    }
    pair_stop(&pair);
}

TEST(sink_that_is_left_alone_keeps_so_much_and_counts_the_rest)
{
    struct pair pair = pair_with(NSN_QOS_CONSUMPTION_LOW, NSN_QOS_RELIABILITY_RELIABLE);
    uint32_t stream = insane_stream(pair.b, NSN_QOS_CONSUMPTION_LOW, NSN_QOS_RELIABILITY_RELIABLE), other, source;
    CHECK_EQUAL(nsn_insane_create_sink(pair.b, stream, 8, NULL, &other), 0);
    CHECK_EQUAL(nsn_insane_create_source(pair.a, insane_stream(pair.a, 1, 1), 8, &source), 0);
    for (uint32_t i = 0; i < NSN_SINK_MESSAGES + 100; i++) {
        emit(pair.a, pair.source, "x", 1);
        if (i % 1000 == 0) {
            emit(pair.a, source, "y", 1);
            expect(pair.b, other, "y");
        }
    }
    emit(pair.a, source, "last", 4);
    expect(pair.b, other, "last");
    CHECK_EQUAL(nsn_insane_dropped(pair.b, pair.sink), 100);
    CHECK_EQUAL(nsn_insane_dropped(pair.b, other), 0);
    CHECK_EQUAL(nsn_insane_available(pair.b, pair.sink, 0), NSN_SINK_MESSAGES);
    char text[256];
    CHECK_EQUAL(nsn_insane_warning(pair.b, text, sizeof text), 1);
    CHECK(strstr(text, "channel 7"));
    CHECK_EQUAL(nsn_insane_warning(pair.b, text, sizeof text), 0);
    pair_stop(&pair);
}

TEST(unreliable_emission_does_not_wait)
{
    struct pair pair = pair_with(NSN_QOS_CONSUMPTION_LOW, NSN_QOS_RELIABILITY_UNRELIABLE);
    static char large[1 << 20];
    int lost = 0, kept = 0;
    for (int i = 0; i < 80; i++) {
        int outcome = nsn_insane_outcome(pair.a, pair.source, emit(pair.a, pair.source, large, sizeof large));
        CHECK(outcome == 1 || outcome == -ENOBUFS);
        lost += outcome < 0;
        kept += outcome > 0;
    }
    CHECK(lost > 5 && kept > 50);
    while (kept--)
        CHECK_EQUAL(nsn_insane_release(pair.b, consume(pair.b, pair.sink)), 1);
    pair_stop(&pair);
}

struct flood { struct nsn_insane *insane; uint32_t source, sink; int count; };

static void *flood(void *context)
{
    struct flood *flood = context;
    static char large[1 << 18];
    for (int i = 0; i < flood->count; i++)
        emit(flood->insane, flood->source, large, sizeof large);
    for (int i = 0; i < flood->count; i++)
        CHECK_EQUAL(nsn_insane_release(flood->insane, consume(flood->insane, flood->sink)), 1);
    return NULL;
}

TEST(two_that_only_emit_do_not_wait_for_each_other)
{
    struct insane_node *node = insane_node_start();
    struct flood floods[2];
    pthread_t threads[2];
    for (uint32_t i = 0; i < 2; i++) {
        floods[i] = (struct flood){.insane = insane_session(node), .count = 255}; /* just below 64 MiB */
        uint32_t stream = insane_stream(floods[i].insane, NSN_QOS_CONSUMPTION_LOW, NSN_QOS_RELIABILITY_RELIABLE);
        CHECK_EQUAL(nsn_insane_create_source(floods[i].insane, stream, i, &floods[i].source), 0);
        CHECK_EQUAL(nsn_insane_create_sink(floods[i].insane, stream, !i, NULL, &floods[i].sink), 0);
    }
    for (int i = 0; i < 2; i++)
        CHECK_EQUAL(pthread_create(&threads[i], NULL, flood, &floods[i]), 0);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 2; i++)
        CHECK_EQUAL(nsn_insane_close(floods[i].insane, 0), 0);
    insane_node_stop(node);
}

/* --- threads ------------------------------------------------------------------------------------------------------ */

struct taker { struct nsn_insane *insane; uint32_t sink; int count, result; };

static void *take_in_order(void *context)
{
    struct taker *taker = context;
    for (int i = 0; i < taker->count; i++) {
        struct nsn_buffer *buffer = consume(taker->insane, taker->sink);
        int value;
        memcpy(&value, buffer->data, sizeof value);
        CHECK_EQUAL(value, i);
        CHECK_EQUAL(nsn_insane_release(taker->insane, buffer), 1);
    }
    return NULL;
}

static void threads_share(int consumption)
{
    enum { THREADS = 3, COUNT = 2000 };
    struct insane_node *node = insane_node_start();
    struct nsn_insane *a = insane_session(node), *b = insane_session(node);
    uint32_t from = insane_stream(a, consumption, 1), to = insane_stream(b, consumption, 1), sources[THREADS];
    struct taker takers[THREADS];
    pthread_t threads[THREADS];
    for (uint32_t i = 0; i < THREADS; i++) {
        takers[i] = (struct taker){.insane = b, .count = COUNT};
        CHECK_EQUAL(nsn_insane_create_source(a, from, i, &sources[i]), 0);
        CHECK_EQUAL(nsn_insane_create_sink(b, to, i, NULL, &takers[i].sink), 0);
        CHECK_EQUAL(pthread_create(&threads[i], NULL, take_in_order, &takers[i]), 0);
    }
    for (int value = 0; value < COUNT; value++)
        for (int i = 0; i < THREADS; i++)
            emit(a, sources[i], &value, sizeof value);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    CHECK_EQUAL(nsn_insane_close(a, 0), 0);
    CHECK_EQUAL(nsn_insane_close(b, 0), 0);
    insane_node_stop(node);
}

TEST(threads_that_sleep_each_get_their_messages_in_order) { threads_share(NSN_QOS_CONSUMPTION_LOW); }
TEST(threads_that_poll_each_get_their_messages_in_order) { threads_share(NSN_QOS_CONSUMPTION_POLL); }
TEST(threads_that_adapt_each_get_their_messages_in_order) { threads_share(NSN_QOS_CONSUMPTION_ADAPTIVE); }

static void *take_once(void *context)
{
    struct taker *taker = context;
    struct nsn_buffer *buffer;
    taker->result = nsn_insane_consume(taker->insane, taker->sink, FOREVER, 0, &buffer);
    return NULL;
}

static void wait_for_waiters(struct nsn_insane *insane, uint32_t count)
{
    for (uint32_t waiters = 0; waiters < count; sched_yield()) {
        nsn_insane_lock(insane);
        waiters = insane->waiters;
        nsn_insane_unlock(insane);
    }
}

TEST(destroying_and_closing_end_a_wait)
{
    for (int consumption = NSN_QOS_CONSUMPTION_POLL; consumption <= NSN_QOS_CONSUMPTION_ADAPTIVE; consumption++) {
        struct pair pair = pair_with(consumption, NSN_QOS_RELIABILITY_RELIABLE);
        struct taker takers[2] = {{.insane = pair.b, .sink = pair.sink}, {.insane = pair.b}};
        pthread_t threads[2];
        CHECK_EQUAL(nsn_insane_create_sink(pair.b, insane_stream(pair.b, consumption, 1), 9, NULL, &takers[1].sink), 0);
        for (int i = 0; i < 2; i++)
            CHECK_EQUAL(pthread_create(&threads[i], NULL, take_once, &takers[i]), 0);
        wait_for_waiters(pair.b, 2);
        CHECK_EQUAL(nsn_insane_destroy_sink(pair.b, pair.sink), 0);
        pthread_join(threads[0], NULL);
        CHECK_EQUAL(takers[0].result, -ESHUTDOWN);
        CHECK_EQUAL(nsn_insane_close(pair.b, 0), 0);
        pthread_join(threads[1], NULL);
        CHECK_EQUAL(takers[1].result, -ESHUTDOWN);
        CHECK_EQUAL(nsn_insane_close(pair.a, 0), 0);
        insane_node_stop(pair.node);
    }
}

static void *emit_many(void *context)
{
    const struct taker *emitter = context;
    for (int i = 0; i < emitter->count; i++)
        emit(emitter->insane, emitter->sink, "some bytes", 10); /* the handle is a source's */
    return NULL;
}

TEST(many_emit_at_once_and_nothing_is_lost)
{
    enum { THREADS = 3, COUNT = 2000 };
    struct pair pair = pair_start();
    struct taker emitter = {.insane = pair.a, .sink = pair.source, .count = COUNT};
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        CHECK_EQUAL(pthread_create(&threads[i], NULL, emit_many, &emitter), 0);
    for (int i = 0; i < THREADS * COUNT; i++)
        expect(pair.b, pair.sink, "some bytes");
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    CHECK_EQUAL(nsn_insane_available(pair.b, pair.sink, 0), 0);
    pair_stop(&pair);
}

/* --- callbacks ---------------------------------------------------------------------------------------------------- */

static struct nsn_insane *called_on;
static uint32_t echo_source;
static int called;

static void echo(nsn_sink_t sink, nsn_buffer_t *buffer)
{
    (void)sink;
    CHECK(nsn_buffer_is_valid(buffer));
    CHECK(nsn_insane_emit(called_on, echo_source, buffer, 0) > 0);
    __atomic_add_fetch(&called, 1, __ATOMIC_RELAXED);
}

TEST(callback_gets_every_message_and_may_emit_it)
{
    for (int consumption = NSN_QOS_CONSUMPTION_POLL; consumption <= NSN_QOS_CONSUMPTION_ADAPTIVE; consumption++) {
        struct pair pair = pair_with(consumption, NSN_QOS_RELIABILITY_RELIABLE);
        uint32_t back, sink, stream = insane_stream(pair.b, consumption, 1);
        struct nsn_buffer *buffer;
        called_on = pair.b;
        called = 0;
        CHECK_EQUAL(nsn_insane_create_source(pair.b, stream, 8, &echo_source), 0);
        CHECK_EQUAL(nsn_insane_create_sink(pair.a, insane_stream(pair.a, consumption, 1), 8, NULL, &back), 0);
        CHECK_EQUAL(nsn_insane_destroy_sink(pair.b, pair.sink), 0);
        CHECK_EQUAL(nsn_insane_create_sink(pair.b, stream, 7, __extension__(void *)echo, &sink), 0);
        CHECK_EQUAL(nsn_insane_consume(pair.b, sink, 0, 0, &buffer), -EINVAL);
        for (int i = 0; i < 300; i++) {
            emit(pair.a, pair.source, "ping", 4);
            if (i % 3 == 0)
                expect(pair.a, back, "ping");
        }
        for (int i = 0; i < 200; i++)
            expect(pair.a, back, "ping");
        CHECK_EQUAL(nsn_insane_destroy_sink(pair.b, sink), 0);
        CHECK_EQUAL(__atomic_load_n(&called, __ATOMIC_RELAXED), 300);
        pair_stop(&pair);
    }
}

static void destroy_own(nsn_sink_t sink, nsn_buffer_t *buffer)
{
    CHECK_EQUAL(nsn_insane_release(called_on, buffer), 1);
    CHECK_EQUAL(nsn_insane_close(called_on, 0), -EDEADLK);
    CHECK_EQUAL(nsn_insane_destroy_sink(called_on, sink), 0);
    __atomic_add_fetch(&called, 1, __ATOMIC_RELEASE); /* pairs with the test's load */
}

TEST(callback_may_destroy_its_sink)
{
    struct pair pair = pair_start();
    uint32_t sink;
    called_on = pair.b;
    called = 0;
    CHECK_EQUAL(nsn_insane_create_sink(pair.b, insane_stream(pair.b, 1, 1), 7, __extension__(void *)destroy_own, &sink), 0);
    for (int i = 0; i < 10; i++)
        emit(pair.a, pair.source, "x", 1);
    while (!__atomic_load_n(&called, __ATOMIC_ACQUIRE))
        sched_yield();
    expect(pair.b, pair.sink, "x"); /* the others go on */
    CHECK_EQUAL(nsn_insane_destroy_sink(pair.b, sink), -EBADF);
    CHECK_EQUAL(__atomic_load_n(&called, __ATOMIC_RELAXED), 1);
    pair_stop(&pair);
}

/* --- an event loop ------------------------------------------------------------------------------------------------ */

TEST(watched_descriptor_becomes_readable)
{
    struct pair pair = pair_start();
    int fd = nsn_insane_watch(pair.b);
    CHECK(fd >= 0);
    for (int i = 0; i < 200; i++) {
        while (!nsn_insane_watch_arm(pair.b))
            CHECK_EQUAL(nsn_insane_available(pair.b, pair.sink, 0), 0);
        emit(pair.a, pair.source, "x", 1);
        struct nsn_buffer *buffer;
        int result;
        do {
            struct pollfd one = {.fd = fd, .events = POLLIN};
            CHECK_EQUAL(poll(&one, 1, 20000), 1);
            nsn_insane_look(pair.b);
            result = nsn_insane_consume(pair.b, pair.sink, 0, 0, &buffer);
        } while (result == -EAGAIN && (nsn_insane_watch_arm(pair.b) || true));
        CHECK_EQUAL(result, 0);
        CHECK_EQUAL(nsn_insane_release(pair.b, buffer), 1);
    }
    nsn_insane_watch_end(pair.b);
    pair_stop(&pair);
}

CHECK_MAIN()
