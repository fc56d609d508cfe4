/* An in-process node that INSANE's primitives find as they find nsnd: by the INFO on a loopback port. */
#ifndef INSANE_NODE_H
#define INSANE_NODE_H

#include <arpa/inet.h>
#include <netinet/in.h>

#include "node.h"
#include "nsn_insane.h"
#include "nsn/nsn.h"

struct insane_node {
    struct node *node;
    pthread_t thread;
    int listener;
    uint32_t port;
};

static void *insane_node_run(void *context)
{
    struct insane_node *node = context;
    for (;;) {
        int fd = accept(node->listener, NULL, NULL);
        if (fd < 0)
            return NULL;
        char line[512];
        int length = snprintf(line, sizeof line,
                              "INFO {\"server_id\":\"T\",\"insane\":{\"uid\":%u,\"pid\":%d,\"socket\":\"%s\"}} \r\n",
                              (unsigned)getuid(), (int)getpid(), node->node->socket_path);
        CHECK_EQUAL(write(fd, line, (size_t)length), length);
        close(fd);
    }
}

static struct insane_node *insane_node_start(void)
{
    struct insane_node *node = calloc(1, sizeof *node);
    node->node = node_start();
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    node->listener = socket(AF_INET, SOCK_STREAM, 0);
    CHECK_EQUAL(bind(node->listener, (struct sockaddr *)&address, sizeof address), 0);
    CHECK_EQUAL(listen(node->listener, 16), 0);
    CHECK_EQUAL(getsockname(node->listener, (struct sockaddr *)&address, &length), 0);
    node->port = ntohs(address.sin_port);
    CHECK_EQUAL(pthread_create(&node->thread, NULL, insane_node_run, node), 0);
    return node;
}

static inline void insane_node_stop(struct insane_node *node)
{
    shutdown(node->listener, SHUT_RDWR);
    pthread_join(node->thread, NULL);
    close(node->listener);
    node_stop(node->node);
    free(node);
}

static inline struct nsn_insane *insane_session_with(struct insane_node *node, struct nsn_insane_options options)
{
    options.application_id = node->port;
    options.name = "test";
    struct nsn_insane *insane = nsn_insane_open(&options);
    if (!insane)
        fprintf(stderr, "%s\n", nsn_insane_error());
    CHECK(insane);
    return insane;
}

static inline struct nsn_insane *insane_session(struct insane_node *node)
{
    return insane_session_with(node, (struct nsn_insane_options){0});
}

static inline uint32_t insane_stream(struct nsn_insane *insane, int consumption, int reliability)
{
    uint32_t stream = 0;
    struct nsn_options options = {.consumption = consumption, .reliability = reliability};
    CHECK_EQUAL(nsn_insane_create_stream(insane, &options, &stream), 0);
    return stream;
}

#endif
