/* A small path tracer for a WASI runtime: one call renders one tile of an image.
 *
 *     render SCENE OUT X Y W H WIDTH HEIGHT SAMPLES [SEED]
 *
 * reads the scene (text, see below) and writes the W x H tile whose upper left corner is pixel (X, Y) of a
 * WIDTH x HEIGHT image to OUT as a binary PPM (P6, 8 bits, sRGB). Missing folders of OUT are made.
 * Every pixel draws from its own random stream, seeded by (SEED, x, y): an image is the same to the bit
 * however it is cut into tiles and wherever they are rendered. Exit status 2: bad arguments or a bad scene.
 *
 * A scene has one thing a line; `#` starts a comment; colours are linear r g b; y points up:
 *     camera   EYE LOOK_AT FOV_DEG [APERTURE FOCUS]  vertical field of view; lens radius and distance in focus
 *     exposure FACTOR
 *     sky      HORIZON ZENITH                        colours; without it the sky is black
 *     sun      DIRECTION RADIUS_DEG COLOUR           irradiance it gives to a surface that faces it
 *     material NAME diffuse COLOUR | checker COLOUR COLOUR SIZE | glossy COLOUR [IOR]
 *                  | mirror COLOUR [FUZZ] | glass COLOUR [IOR] | light COLOUR
 *     sphere   MATERIAL CENTRE RADIUS
 *     box      MATERIAL CORNER CORNER                axis-aligned
 *     plane    MATERIAL POINT NORMAL                 infinite
 */
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_OBJECTS = 20000, MAX_PLANES = 16, MAX_MATERIALS = 256, MAX_LIGHTS = 64, MAX_DEPTH = 16, LEAF = 4 };
enum { MAX_LINE = 512, MAX_NAME = 32, MAX_SIDE = 16384, MAX_SAMPLES = 65536 };
#define PI 3.14159265f
#define EPSILON 1e-3f
#define BRIGHTEST 1.2f /* of a lamp that lights a diffuse surface by way of a mirror or glass: a little less light
                          there for far less noise */

typedef float vec __attribute__((vector_size(16))); /* x y z; w unused */
typedef enum { DIFFUSE, CHECKER, GLOSSY, MIRROR, GLASS, LIGHT } Kind;
typedef enum { SPHERE, BOX, PLANE } Shape;
typedef struct { char name[MAX_NAME]; Kind kind; vec colour, other; float value; } Material;
typedef struct { Shape shape; int material; vec a, b; float radius; } Object; /* a, b: corners, or point and normal */
typedef struct { vec lo, hi; int first, count, right, axis; } Node;           /* a leaf has count > 0 */
typedef struct { vec origin, dir, inverse; } Ray;
typedef struct { float t; const Object *object; } Hit;

static struct {
    vec eye, right, up, forward, horizon, zenith, sun, sun_colour;
    float tangent, aperture, focus, exposure, sun_cos;
    bool has_camera, has_sun;
    Material materials[MAX_MATERIALS];
    Object objects[MAX_OBJECTS], planes[MAX_PLANES], lights[MAX_LIGHTS];
    Node nodes[2 * MAX_OBJECTS];
    int material_count, object_count, plane_count, light_count, node_count;
} scene;

static uint64_t rays;

/* ---- vectors and random numbers ---- */

static const vec ZERO = {0, 0, 0, 0}, ONE = {1, 1, 1, 1};

static vec v3(float x, float y, float z) { return (vec){x, y, z, 0}; }
static float dot(vec a, vec b) { vec p = a * b; return p[0] + p[1] + p[2]; }
static vec yzx(vec a) { return (vec){a[1], a[2], a[0], a[3]}; }
static vec zxy(vec a) { return (vec){a[2], a[0], a[1], a[3]}; }
static vec cross(vec a, vec b) { return yzx(a) * zxy(b) - zxy(a) * yzx(b); }
static vec unit(vec a) { return a / sqrtf(dot(a, a)); }
static vec mix(vec a, vec b, float t) { return a + (b - a) * t; }
static vec least(vec a, vec b) { return v3(fminf(a[0], b[0]), fminf(a[1], b[1]), fminf(a[2], b[2])); }
static vec most(vec a, vec b) { return v3(fmaxf(a[0], b[0]), fmaxf(a[1], b[1]), fmaxf(a[2], b[2])); }
static float largest(vec a) { return fmaxf(a[0], fmaxf(a[1], a[2])); }
static vec reflect(vec d, vec n) { return d - n * (2 * dot(d, n)); }

static uint64_t scramble(uint64_t z) /* the finalizer of SplitMix64 */
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static float uniform(uint64_t *state) /* [0, 1), SplitMix64 */
{
    *state += 0x9e3779b97f4a7c15u;
    return (float)(scramble(*state) >> 40) * 0x1p-24f;
}

static vec around(vec axis, float cosine, float turn) /* the unit vector at that angle from the axis */
{
    vec side = unit(fabsf(axis[0]) > 0.5f ? cross(axis, v3(0, 1, 0)) : cross(axis, v3(1, 0, 0)));
    float sine = sqrtf(fmaxf(0, 1 - cosine * cosine)), angle = 2 * PI * turn;
    return side * (sine * cosf(angle)) + cross(axis, side) * (sine * sinf(angle)) + axis * cosine;
}

/* ---- reading the scene ---- */

static void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("render: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    exit(2);
}

static const char *scene_path;
static int line_number;
#define BAD(...) (fprintf(stderr, "render: %s:%d: ", scene_path, line_number), \
                  fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), exit(2))

static char *word(const char *what)
{
    char *token = strtok(NULL, " \t\r\n");
    if (!token) BAD("%s expected", what);
    return token;
}

static bool number_follows(float *value, bool required, const char *what)
{
    char *token = strtok(NULL, " \t\r\n"), *end;
    if (!token && !required) return false;
    if (!token) BAD("%s expected", what);
    *value = strtof(token, &end);
    if (*end || !isfinite(*value)) BAD("%s expected, not '%s'", what, token);
    return true;
}

static float number(const char *what) { float f; number_follows(&f, true, what); return f; }

static float optional(float otherwise, const char *what)
{
    number_follows(&otherwise, false, what);
    return otherwise;
}

static vec triple(const char *what)
{
    float x = number(what), y = number(what), z = number(what);
    return v3(x, y, z);
}

static vec direction(const char *what)
{
    vec d = triple(what);
    if (dot(d, d) < 1e-12f) BAD("%s must not be zero", what);
    return unit(d);
}

static float positive(float value, const char *what)
{
    if (!(value > 0)) BAD("%s must be above 0", what);
    return value;
}

static int material_named(const char *name)
{
    for (int i = 0; i < scene.material_count; i++)
        if (!strcmp(scene.materials[i].name, name)) return i;
    BAD("unknown material '%s'", name);
    return 0;
}

static void read_material(void)
{
    static const char *const kinds[] = {"diffuse", "checker", "glossy", "mirror", "glass", "light"};
    if (scene.material_count == MAX_MATERIALS) BAD("more than %d materials", MAX_MATERIALS);
    Material *m = &scene.materials[scene.material_count++];
    char *name = word("a name");
    if (strlen(name) >= MAX_NAME) BAD("the name '%s' is too long", name);
    strcpy(m->name, name);
    char *kind = word("a kind of material");
    for (m->kind = DIFFUSE; m->kind <= LIGHT && strcmp(kinds[m->kind], kind); m->kind++) {}
    if (m->kind > LIGHT) BAD("unknown kind of material '%s'", kind);
    m->colour = triple("a colour");
    if (m->kind == CHECKER) m->other = triple("a second colour"), m->value = positive(number("a size"), "a size");
    if (m->kind == MIRROR) m->value = optional(0, "a fuzz");
    if (m->kind == GLASS || m->kind == GLOSSY) m->value = positive(optional(1.5f, "an index"), "an index");
}

static void read_object(Shape shape)
{
    Object o = {.shape = shape, .material = material_named(word("a material"))};
    o.a = triple(shape == SPHERE ? "a centre" : shape == BOX ? "a corner" : "a point");
    if (shape == SPHERE) o.radius = positive(number("a radius"), "a radius");
    if (shape == PLANE) o.b = direction("a normal");
    if (shape == BOX) {
        vec p = o.a, q = triple("a corner");
        o.a = least(p, q), o.b = most(p, q);
    }
    bool emits = scene.materials[o.material].kind == LIGHT;
    if (emits && shape == PLANE) BAD("a plane cannot be a light");
    if (emits && scene.light_count == MAX_LIGHTS) BAD("more than %d lights", MAX_LIGHTS);
    if (emits) scene.lights[scene.light_count++] = o;
    if (shape == PLANE && scene.plane_count == MAX_PLANES) BAD("more than %d planes", MAX_PLANES);
    if (shape != PLANE && scene.object_count == MAX_OBJECTS) BAD("more than %d objects", MAX_OBJECTS);
    if (shape == PLANE) scene.planes[scene.plane_count++] = o;
    else scene.objects[scene.object_count++] = o;
}

static void read_camera(void)
{
    scene.eye = triple("an eye point");
    vec target = triple("a point to look at");
    scene.tangent = tanf(number("a field of view") * PI / 360);
    if (!(scene.tangent > 0 && scene.tangent < 100)) BAD("the field of view must lie between 0 and 179 degrees");
    scene.forward = target - scene.eye;
    float distance = sqrtf(dot(scene.forward, scene.forward));
    if (distance < 1e-6f) BAD("the camera looks at itself");
    scene.forward /= distance;
    vec right = cross(scene.forward, v3(0, 1, 0));
    if (dot(right, right) < 1e-12f) right = v3(1, 0, 0);
    scene.right = unit(right);
    scene.up = cross(scene.right, scene.forward);
    scene.aperture = optional(0, "an aperture");
    scene.focus = positive(optional(distance, "a focus distance"), "the focus distance");
    scene.has_camera = true;
}

static void read_scene(const char *path)
{
    char line[MAX_LINE];
    FILE *file = fopen(scene_path = path, "r");
    if (!file) fail("cannot read %s: %s", path, strerror(errno));
    scene.exposure = 1;
    while (fgets(line, sizeof line, file)) {
        line_number++;
        if (strlen(line) == MAX_LINE - 1) BAD("line too long");
        line[strcspn(line, "#")] = 0;
        char *what = strtok(line, " \t\r\n");
        if (!what) continue;
        if (!strcmp(what, "camera")) read_camera();
        else if (!strcmp(what, "exposure")) scene.exposure = positive(number("a factor"), "the exposure");
        else if (!strcmp(what, "sky")) scene.horizon = triple("a colour"), scene.zenith = triple("a second colour");
        else if (!strcmp(what, "sun")) {
            scene.sun = direction("a direction");
            scene.sun_cos = cosf(positive(number("a radius"), "the radius") * PI / 180);
            scene.sun_colour = triple("a colour");
            scene.has_sun = true;
        }
        else if (!strcmp(what, "material")) read_material();
        else if (!strcmp(what, "sphere")) read_object(SPHERE);
        else if (!strcmp(what, "box")) read_object(BOX);
        else if (!strcmp(what, "plane")) read_object(PLANE);
        else BAD("unknown word '%s'", what);
        char *rest = strtok(NULL, " \t\r\n");
        if (rest) BAD("unexpected '%s'", rest);
    }
    if (ferror(file)) fail("cannot read %s", path);
    fclose(file);
    if (!scene.has_camera) fail("%s: no camera", path);
}

/* ---- which object does a ray meet: a tree of bounding boxes ---- */

static int split_axis;

static float centre(const Object *o, int axis)
{
    return o->shape == SPHERE ? o->a[axis] : (o->a[axis] + o->b[axis]) / 2;
}

static int by_centre(const void *p, const void *q)
{
    float a = centre(p, split_axis), b = centre(q, split_axis);
    return (a > b) - (a < b);
}

static int build_tree(int first, int count)
{
    int index = scene.node_count++;
    Node node = {.lo = v3(INFINITY, INFINITY, INFINITY), .first = first};
    node.hi = -node.lo;
    for (const Object *o = scene.objects + first; o < scene.objects + first + count; o++) {
        node.lo = least(node.lo, o->shape == SPHERE ? o->a - o->radius : o->a);
        node.hi = most(node.hi, o->shape == SPHERE ? o->a + o->radius : o->b);
    }
    if (count <= LEAF) {
        node.count = count;
    } else {
        vec size = node.hi - node.lo;
        node.axis = size[0] >= size[1] && size[0] >= size[2] ? 0 : size[1] >= size[2] ? 1 : 2;
        split_axis = node.axis;
        qsort(scene.objects + first, count, sizeof(Object), by_centre);
        build_tree(first, count / 2);
        node.right = build_tree(first + count / 2, count - count / 2);
    }
    scene.nodes[index] = node;
    return index;
}

static Ray ray(vec origin, vec dir) { return (Ray){origin, dir, ONE / dir}; }

/* Where the ray enters and leaves the box; enter > leave where it misses. */
static void slab(const Ray *r, vec lo, vec hi, float *enter, float *leave)
{
    vec a = (lo - r->origin) * r->inverse, b = (hi - r->origin) * r->inverse;
    *enter = fmaxf(fmaxf(a[0] < b[0] ? a[0] : b[0], a[1] < b[1] ? a[1] : b[1]), a[2] < b[2] ? a[2] : b[2]);
    *leave = fminf(fminf(a[0] < b[0] ? b[0] : a[0], a[1] < b[1] ? b[1] : a[1]), a[2] < b[2] ? b[2] : a[2]);
}

static float distance_to(const Object *o, const Ray *r) /* 0 if the ray misses */
{
    if (o->shape == SPHERE) {
        vec to = o->a - r->origin;
        float along = dot(to, r->dir);
        vec off = to - r->dir * along;
        float square = o->radius * o->radius - dot(off, off);
        if (square <= 0) return 0;
        float root = sqrtf(square);
        return along - root > EPSILON ? along - root : along + root > EPSILON ? along + root : 0;
    }
    if (o->shape == BOX) {
        float enter, leave;
        slab(r, o->a, o->b, &enter, &leave);
        if (enter > leave) return 0;
        return enter > EPSILON ? enter : leave > EPSILON ? leave : 0;
    }
    float slope = dot(r->dir, o->b), t = fabsf(slope) < 1e-6f ? 0 : dot(o->a - r->origin, o->b) / slope;
    return t > EPSILON ? t : 0;
}

/* The nearest object before `limit`; with `any` the first one found will do. */
static bool trace(const Ray *r, float limit, bool any, Hit *hit)
{
    int stack[64], depth = 0;
    rays++;
    *hit = (Hit){limit, NULL};
    for (int i = 0; i < scene.plane_count; i++) {
        float t = distance_to(&scene.planes[i], r);
        if (t > 0 && t < hit->t) *hit = (Hit){t, &scene.planes[i]};
    }
    if (scene.object_count) stack[depth++] = 0;
    while (depth && !(any && hit->object)) {
        int index = stack[--depth];
        const Node *node = &scene.nodes[index];
        float enter, leave;
        slab(r, node->lo, node->hi, &enter, &leave);
        if (enter > leave || leave < 0 || enter > hit->t) continue;
        for (const Object *o = scene.objects + node->first; o < scene.objects + node->first + node->count; o++) {
            float t = distance_to(o, r);
            if (t > 0 && t < hit->t) *hit = (Hit){t, o};
        }
        if (!node->count) { /* the nearer child is looked at first */
            bool backwards = r->dir[node->axis] < 0;
            stack[depth++] = backwards ? index + 1 : node->right;
            stack[depth++] = backwards ? node->right : index + 1;
        }
    }
    return hit->object;
}

static vec normal_at(const Object *o, vec p) /* outward */
{
    if (o->shape == SPHERE) return (p - o->a) / o->radius;
    if (o->shape == PLANE) return o->b;
    vec half = (o->b - o->a) / 2, d = (p - (o->a + o->b) / 2);
    float x = half[0] - fabsf(d[0]), y = half[1] - fabsf(d[1]), z = half[2] - fabsf(d[2]);
    if (x <= y && x <= z) return v3(copysignf(1, d[0]), 0, 0);
    return y <= z ? v3(0, copysignf(1, d[1]), 0) : v3(0, 0, copysignf(1, d[2]));
}

/* ---- light ---- */

static vec sky(vec dir, bool with_sun)
{
    if (with_sun && scene.has_sun && dot(dir, scene.sun) > scene.sun_cos)
        return scene.sun_colour / (2 * PI * (1 - scene.sun_cos));
    return mix(scene.horizon, scene.zenith, sqrtf(fmaxf(0, dir[1])));
}

/* A direction towards the lamp, how far it may go before it meets the lamp, and the reciprocal of the
 * density (per steradian) with which it was drawn; 0 if p lies inside the lamp. */
static float towards(const Object *lamp, vec p, uint64_t *rng, vec *dir, float *limit)
{
    float u = uniform(rng), v = uniform(rng);
    if (lamp->shape == SPHERE) {
        vec axis = lamp->a - p;
        float square = dot(axis, axis), edge = lamp->radius * lamp->radius / square;
        if (edge >= 1) return 0;
        float cosine = sqrtf(1 - edge);
        *dir = around(axis / sqrtf(square), 1 - u * (1 - cosine), v);
        Ray r = ray(p, *dir);
        float t = distance_to(lamp, &r);
        *limit = (t > 0 ? t : sqrtf(square)) - EPSILON;
        return 2 * PI * (1 - cosine);
    }
    float area[3], total = 0; /* of the faces that p can see, at most one an axis */
    for (int k = 0; k < 3; k++) {
        vec size = lamp->b - lamp->a;
        bool outside = p[k] < lamp->a[k] || p[k] > lamp->b[k];
        total += area[k] = outside ? size[(k + 1) % 3] * size[(k + 2) % 3] : 0;
    }
    if (total <= 0) return 0;
    int k = 0;
    float pick = uniform(rng) * total;
    while (k < 2 && pick >= area[k]) pick -= area[k++];
    vec at = lamp->a + (lamp->b - lamp->a) * v3(u, v, u);
    at[k] = p[k] < lamp->a[k] ? lamp->a[k] : lamp->b[k];
    if (k == 2) at[1] = lamp->a[1] + (lamp->b[1] - lamp->a[1]) * v;
    if (k == 1) at[2] = lamp->a[2] + (lamp->b[2] - lamp->a[2]) * v;
    vec to = at - p;
    float square = dot(to, to), length = sqrtf(square);
    *dir = to / length;
    *limit = length - EPSILON;
    return fabsf((*dir)[k]) * total / square;
}

/* Light that reaches the point p straight from one lamp or the sun, chosen at random, times cosine / pi. */
static vec direct_light(vec p, vec normal, uint64_t *rng)
{
    int sources = scene.light_count + scene.has_sun;
    if (!sources) return ZERO;
    int pick = (int)(uniform(rng) * sources);
    vec dir, colour;
    float limit = INFINITY, weight = 1 / PI;
    if (pick < scene.light_count) {
        colour = scene.materials[scene.lights[pick].material].colour;
        weight *= towards(&scene.lights[pick], p, rng, &dir, &limit);
    } else {
        float u = uniform(rng);
        colour = scene.sun_colour;
        dir = around(scene.sun, 1 - u * (1 - scene.sun_cos), uniform(rng));
    }
    weight *= dot(dir, normal) * sources;
    if (!(weight > 0)) return ZERO;
    Hit blocker;
    Ray r = ray(p, dir);
    return trace(&r, limit, true, &blocker) ? ZERO : colour * weight;
}

static float fresnel(float cosine, float ratio) /* Schlick's approximation; ratio of the indices */
{
    float r0 = (1 - ratio) / (1 + ratio), c = 1 - cosine;
    r0 *= r0;
    return r0 + (1 - r0) * c * c * c * c * c;
}

static vec through_glass(vec dir, vec outward, float index, uint64_t *rng) /* reflected or refracted */
{
    bool enters = dot(dir, outward) < 0;
    vec normal = enters ? outward : -outward;
    float ratio = enters ? 1 / index : index, cosine = fminf(1, -dot(dir, normal));
    float square = 1 - ratio * ratio * (1 - cosine * cosine);
    if (square < 0) return reflect(dir, normal);
    float out = sqrtf(square);
    if (uniform(rng) < fresnel(enters ? cosine : out, index)) return reflect(dir, normal);
    return unit(dir * ratio + normal * (ratio * cosine - out));
}

static vec seen(vec light, bool scattered)
{
    float peak = largest(light);
    return scattered && peak > BRIGHTEST ? light * (BRIGHTEST / peak) : light;
}

static vec radiance(Ray r, uint64_t *rng)
{
    vec light = ZERO, weight = ONE;
    bool sees_lamps = true; /* false after a diffuse bounce: direct_light has counted them already */
    bool scattered = false;
    for (int depth = 0; depth < MAX_DEPTH; depth++) {
        Hit hit;
        if (!trace(&r, INFINITY, false, &hit)) return light + weight * seen(sky(r.dir, sees_lamps), scattered);
        const Material *m = &scene.materials[hit.object->material];
        vec p = r.origin + r.dir * hit.t, outward = normal_at(hit.object, p), dir;
        vec normal = dot(r.dir, outward) < 0 ? outward : -outward, colour = m->colour;
        bool coat = m->kind == GLOSSY && !scattered && uniform(rng) < fresnel(-dot(r.dir, normal), m->value);
        if (m->kind == LIGHT) return sees_lamps ? light + weight * seen(colour, scattered) : light;
        if (m->kind == CHECKER) {
            vec cell = p / m->value + EPSILON;
            if ((int)(floorf(cell[0]) + floorf(cell[1]) + floorf(cell[2])) & 1) colour = m->other;
        }
        if (m->kind == MIRROR) {
            dir = reflect(r.dir, normal);
            if (m->value > 0) {
                float u = uniform(rng); /* drawn one by one: compilers order arguments as they like */
                dir = unit(dir + around(normal, 2 * u - 1, uniform(rng)) * m->value);
            }
            if (dot(dir, normal) <= 0) return light;
        } else if (m->kind == GLASS) {
            dir = through_glass(r.dir, outward, m->value, rng);
        } else if (coat) {
            dir = reflect(r.dir, normal);
            colour = ONE;
        } else {
            light += weight * colour * direct_light(p, normal, rng);
            float u = uniform(rng);
            dir = around(normal, sqrtf(1 - u), uniform(rng));
            scattered = true;
        }
        sees_lamps = m->kind == MIRROR || m->kind == GLASS || coat;
        weight *= colour;
        if (depth >= 3) { /* Russian roulette */
            float survives = fminf(0.95f, largest(weight));
            if (!(uniform(rng) < survives)) return light;
            weight /= survives;
        }
        r = ray(p, dir);
    }
    return light;
}

/* ---- the image ---- */

static vec pixel(int x, int y, int width, int height, int samples, uint64_t seed)
{
    uint64_t rng = scramble(scramble(scramble(seed) + (uint64_t)x) + (uint64_t)y);
    int grid = (int)sqrtf((float)samples);
    vec sum = ZERO;
    for (int s = 0; s < samples; s++) { /* the first grid x grid samples are stratified over the pixel */
        float u = uniform(&rng), v = uniform(&rng);
        if (s < grid * grid) u = (s % grid + u) / grid, v = (s / grid + v) / grid;
        float sx = (2 * (x + u) - width) / height * scene.tangent, sy = (height - 2 * (y + v)) / height * scene.tangent;
        vec target = (scene.forward + scene.right * sx + scene.up * sy) * scene.focus, lens = ZERO;
        if (scene.aperture > 0) {
            float radius = scene.aperture * sqrtf(uniform(&rng)), angle = 2 * PI * uniform(&rng);
            lens = scene.right * (radius * cosf(angle)) + scene.up * (radius * sinf(angle));
        }
        vec sample = radiance(ray(scene.eye + lens, unit(target - lens)), &rng);
        if (isfinite(largest(sample))) sum += sample;
    }
    return sum * (scene.exposure / samples);
}

static uint8_t encode(float linear) /* a filmic curve (Narkowicz's fit of ACES), then sRGB */
{
    float c = linear * (2.51f * linear + 0.03f) / (linear * (2.43f * linear + 0.59f) + 0.14f);
    c = fminf(fmaxf(c, 0), 1);
    c = c <= 0.0031308f ? 12.92f * c : 1.055f * powf(c, 1 / 2.4f) - 0.055f;
    return (uint8_t)(c * 255 + 0.5f);
}

static int integer(const char *text, const char *what, int low, int high)
{
    char *end;
    long value = strtol(text, &end, 10);
    if (!*text || *end || value < low || value > high) fail("%s: %d to %d, not '%s'", what, low, high, text);
    return (int)value;
}

static FILE *create(const char *path)
{
    char folder[1024];
    if (strlen(path) >= sizeof folder) fail("path too long");
    strcpy(folder, path);
    for (char *slash = strchr(folder + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(folder, 0777); /* what is already there is fine; anything else shows when the file is opened */
        *slash = '/';
    }
    FILE *file = fopen(path, "wb");
    if (!file) fail("cannot write %s: %s", path, strerror(errno));
    return file;
}

int main(int argc, char **argv)
{
    if (argc < 10 || argc > 11) fail("usage: render SCENE OUT X Y W H WIDTH HEIGHT SAMPLES [SEED]");
    int width = integer(argv[7], "WIDTH", 1, MAX_SIDE), height = integer(argv[8], "HEIGHT", 1, MAX_SIDE);
    int left = integer(argv[3], "X", 0, width - 1), top = integer(argv[4], "Y", 0, height - 1);
    int w = integer(argv[5], "W", 1, width - left), h = integer(argv[6], "H", 1, height - top);
    int samples = integer(argv[9], "SAMPLES", 1, MAX_SAMPLES);
    uint64_t seed = argc > 10 ? (uint64_t)integer(argv[10], "SEED", 0, INT32_MAX) : 1;

    read_scene(argv[1]);
    if (scene.object_count) build_tree(0, scene.object_count);
    FILE *out = create(argv[2]);
    fprintf(out, "P6\n%d %d\n255\n", w, h);
    for (int y = top; y < top + h; y++)
        for (int x = left; x < left + w; x++) {
            vec c = pixel(x, y, width, height, samples, seed);
            uint8_t rgb[3] = {encode(c[0]), encode(c[1]), encode(c[2])};
            fwrite(rgb, 1, 3, out);
        }
    bool failed = ferror(out);
    if (fclose(out) || failed) fail("cannot write %s", argv[2]);
    printf("%dx%d tile at %d,%d of %dx%d: %d samples a pixel, %llu rays\n", w, h, left, top, width, height, samples,
           (unsigned long long)rays);
    return 0;
}
