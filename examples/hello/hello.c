/* The smallest useful payload: hello NAME [IN OUT] prints "Hello NAME" and, given two files, writes that line
 * and then the content of IN to OUT. Exit status 1 if a file cannot be opened, 2 for wrong arguments. */
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void say(int file, const char *text) { (void)!write(file, text, strlen(text)); }

static void greet(int file, const char *name)
{
    say(file, "Hello ");
    say(file, name);
    say(file, "\n");
}

static void make_folders(char *path)
{
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0777); /* one that cannot be made shows when the file is opened */
        *slash = '/';
    }
}

int main(int argc, char **argv)
{
    char buffer[4096];
    ssize_t size;
    if (argc != 2 && argc != 4) {
        say(2, "usage: hello NAME [IN OUT]\n");
        return 2;
    }
    greet(1, argv[1]);
    if (argc == 2) return 0;
    make_folders(argv[3]);
    int in = open(argv[2], O_RDONLY), out = open(argv[3], O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (in < 0 || out < 0) {
        say(2, in < 0 ? "hello: cannot read the input\n" : "hello: cannot write the output\n");
        return 1;
    }
    greet(out, argv[1]);
    while ((size = read(in, buffer, sizeof buffer)) > 0)
        if (write(out, buffer, size) != size) return 1;
    return size < 0 || close(out);
}
